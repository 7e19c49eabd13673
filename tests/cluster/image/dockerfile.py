"""What a Dockerfile says: stages with their instructions, and the rules that ours keeps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

TARGETS = ("cpu", "gpu")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|ACCESS_KEY|^AWS_|API_KEY", re.IGNORECASE)
_BUILD_TOOLS = {"gcc", "g++", "build-essential", "make", "git", "curl", "wget", "sudo", "libc6-dev"}


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def values(self, word: str) -> list[str]:
        """Return the arguments of every instruction of one kind, in order."""
        return [rest for found, rest in self.instructions if found == word]

    def settings(self, word: str) -> dict[str, str]:
        """Return the pairs of ENV, LABEL or ARG (an ARG without default is empty)."""
        pairs = (pair.partition("=") for rest in self.values(word) for pair in shlex.split(rest))
        return {key: value for key, _, value in pairs}


def parse(text: str) -> dict[str, Stage]:
    """Return the stages by name; the stage "" holds what stands before the first FROM."""
    stages = {"": Stage("", "")}
    current = stages[""]
    for word, rest in _instructions(text):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = stages[name or base] = Stage(name or base, base)
        else:
            current.instructions.append((word, rest))
    return stages


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word.upper(), rest.strip()


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """Return a stage and those it is FROM, the lowest first: all that ends in its image."""
    stage = stages[name]
    below = lineage(stages, stage.base) if stage.base in stages else []
    return [*below, stage]


def image(stages: dict[str, Stage], name: str) -> Stage:
    """Return a stage with everything from those below it."""
    parts = lineage(stages, name)
    return Stage(name, parts[0].base, [one for part in parts for one in part.instructions])


def findings(text: str) -> list[str]:
    """Return what is wrong with a Dockerfile of ours, a sentence each; empty if nothing is."""
    stages = parse(text)
    wrong = [line for target in TARGETS for line in _of_image(image(stages, target))]
    for stage in stages.values():
        wrong += [f"ADD {rest}: COPY says what it does" for rest in stage.values("ADD")]
        if stage.name and stage.base not in stages and stage.base != "${BASE_IMAGE}":
            wrong.append(f"{stage.name} is FROM {stage.base}, not from the one base")
        wrong += [
            f"{word} {key} looks like a secret: an image is read by everyone who pulls it"
            for word in ("ENV", "ARG", "LABEL")
            for key in stage.settings(word)
            if _SECRET.search(key)
        ]
        wrong += [
            f"{rest[:40]}: what a URL returns is not pinned"
            for rest in stage.values("RUN")
            if re.search(r"\b(curl|wget)\b", rest)
        ]
        wrong += [f"COPY {rest}: a whole tree" for rest in stage.values("COPY") if re.match(r"\.\s|\./\s", rest)]
    base = stages[""].settings("ARG").get("BASE_IMAGE", "")
    if not re.search(r":\d+\.\d+|@sha256:[0-9a-f]{64}$", base):
        wrong.append(f"base image '{base}' names no version")
    return wrong


def _of_image(stage: Stage) -> Iterator[str]:
    users = stage.values("USER")
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield f"{stage.name}: USER {users[-1:]} is not a number, or is root: Kubernetes cannot know that it is not root"
    installed = {word for rest in stage.values("RUN") if "apt-get install" in rest for word in rest.split()}
    if tools := sorted(installed & _BUILD_TOOLS):
        yield f"{stage.name} holds what only a build needs: {', '.join(tools)}"
    if any("apt-get update" in rest and "rm -rf /var/lib/apt/lists" not in rest for rest in stage.values("RUN")):
        yield f"{stage.name} holds the package lists of apt-get"
    copied = [rest.split()[-1] for rest in stage.values("COPY")]
    if copied != ["/opt/venv", "/app"]:
        yield f"{stage.name} copies {copied}: first the packages, then the code, nothing else"
    if stage.values("WORKDIR")[-1:] != ["/app"]:
        yield f"{stage.name} does not start in /app, where jobs are submitted"
    environment = stage.settings("ENV")
    if not environment.get("PATH", "").startswith("/opt/venv/bin:") or environment.get("PYTHONPATH") != "/app":
        yield f"{stage.name} does not find its packages or the code"
