#!/usr/bin/env bash
# Known vulnerabilities in what is installed, extra by extra: pip-audit, in an environment of its own, and pip check.
# Exit status: 0 none known; 1 vulnerabilities; 2 packages that do not fit together; 3 the advisories could not be had,
# so nothing is known.      bash scripts/setup.sh dev vllm deepspeed && bash scripts/audit.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=${AUDIT_VENV:-.venv/audit}
if [ ! -x "$tools/bin/pip-audit" ]; then
  .venv/bin/python -m venv --without-pip "$tools"
  if ! .venv/bin/python -m pip --python "$tools/bin/python" install --quiet --disable-pip-version-check "pip-audit>=2.10"; then
    echo "NOT AUDITED: pip-audit cannot be installed; check the network, or name an environment that has it: AUDIT_VENV" >&2
    exit 3
  fi
fi
exec .venv/bin/python scripts/audit.py "$tools/bin/pip-audit"
