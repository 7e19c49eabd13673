#!/bin/sh
# Build the programs that test_api_server.py runs, on Debian 12, from Debian's source of Kubernetes (1.20, the last that is
# whole) and with its Go: minutes, 4 GB below FOLDER. As root: it installs packages. Newer ones need no building: setup-envtest.
#
#     tests/cluster/kubernetes/build_api_server.sh FOLDER     # then KUBEBUILDER_ASSETS=FOLDER/bin
set -eu
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
mkdir -p "$1/bin" "$1/apt/lists/partial" "$1/go/src/k8s.io"
folder=$(cd "$1" && pwd)

# Sources of the same mirror that packages come from, beside the machine's own lists.
sed 's/^Types:.*/Types: deb-src/' /etc/apt/sources.list.d/debian.sources > "$folder/apt/debian.sources"
only="-o Dir::Etc::sourcelist=$folder/apt/debian.sources -o Dir::Etc::sourceparts=- -o Dir::State::lists=$folder/apt/lists"
apt-get update -qq
apt-get install -qq -y dpkg-dev etcd-server golang-github-modern-go-reflect2-dev golang-go make rsync
# shellcheck disable=SC2086
{ apt-get $only update -qq && cd "$folder/apt" && apt-get $only source -qq --download-only kubernetes; }

code=$folder/go/src/k8s.io/kubernetes
rm -rf "$code" && mkdir "$code"
tar -xf "$folder"/apt/kubernetes_*.orig.tar.gz -C "$code" --strip-components=1
# The copy in the source does not work with Go 1.18 or later: the API server ends at the first custom resource.
reflect=$code/vendor/github.com/modern-go/reflect2
rm -r "$reflect" && cp -r /usr/share/gocode/src/github.com/modern-go/reflect2 "$reflect" && rm -f "$reflect"/*_test.go

cd "$code"
export GOPATH="$folder/go" GO111MODULE=off FORCE_HOST_GO=y GOCACHE="$folder/cache"
export KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=clean
make WHAT="cmd/kube-apiserver cmd/kube-controller-manager cmd/kube-scheduler"
cp _output/bin/kube-apiserver _output/bin/kube-controller-manager _output/bin/kube-scheduler "$folder/bin"
cp "$(command -v etcd)" "$folder/bin"
