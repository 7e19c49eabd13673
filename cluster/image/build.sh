#!/usr/bin/env bash
# Builds slerp-tat and slerp-tat-gpu from this working tree with docker, podman or buildah: the first that works.
#   cluster/image/build.sh [arguments of `build`, such as --build-arg BASE_IMAGE=...]
# Environment: IMAGE_TOOL instead of the first that works; TARGETS (default: "cpu gpu").
set -euo pipefail
cd "$(dirname "$0")/../.."

works() { # docker and podman may be installed without a daemon or rights
  command -v "$1" >/dev/null && { [ "$1" = buildah ] || "$1" info >/dev/null 2>&1; }
}

tool=${IMAGE_TOOL:-}
for candidate in docker podman buildah; do
  if [ -z "$tool" ] && works "$candidate"; then tool=$candidate; fi
done
if [ -z "$tool" ]; then
  echo "error: no docker, podman or buildah that works was found; install one, or set IMAGE_TOOL" >&2
  exit 2
fi

command -v "$tool" >/dev/null || { echo "error: IMAGE_TOOL is '$tool', which is not installed" >&2; exit 2; }

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git describe --always --dirty --abbrev=12 2>/dev/null || true)
export DOCKER_BUILDKIT=1
for target in ${TARGETS:-cpu gpu}; do
  case $target in
    cpu) image=slerp-tat:$version ;;
    gpu) image=slerp-tat-gpu:$version ;;
    *) echo "error: TARGETS holds '$target'; targets are cpu and gpu" >&2; exit 2 ;;
  esac
  echo "$tool builds $image (${revision:-no commit})"
  "$tool" build --file cluster/image/Dockerfile --target "$target" --tag "$image" --build-arg "REVISION=$revision" "$@" .
done
