"""Fail if a package of an environment has a known vulnerability: `python audit.py PIP_AUDIT SITE_PACKAGES`.

pip-audit ends with the same code for a vulnerability and for a network that does not let it ask. Here only the first is
a failure, and the second is said. That pip-audit itself works is seen by a run that asks nobody.
"""

import json
import subprocess
import sys

_PATIENCE_SECONDS = 300


def main(pip_audit: str, site_packages: str) -> int:
    """The exit code."""
    command = [pip_audit, "--path", site_packages, "--skip-editable", "--progress-spinner", "off", "--format", "json"]
    subprocess.run([*command, "--dry-run"], check=True, capture_output=True, timeout=_PATIENCE_SECONDS)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        why = str(error) if isinstance(error, subprocess.TimeoutExpired) else done.stderr.strip().rpartition("\n")[2]
        print(f"NOT AUDITED: the data about vulnerabilities cannot be reached: {why}", file=sys.stderr)
        return 0
    found = [(package, flaw) for package in packages for flaw in package.get("vulns", [])]
    for package, flaw in found:
        mend = ", ".join(flaw["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {flaw['id']}, fixed in {mend}")
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    audited = len(packages) - len(unknown)
    print(f"{audited} packages audited, {len(found)} vulnerabilities")
    if unknown:
        print(f"NOT AUDITED, being unknown to the data that was reached: {', '.join(unknown)}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
