#!/usr/bin/env bash
# Makes .venv if missing, installs, and lets a tiny language model learn arithmetic by ReMix, in minutes on two cores.
# Arguments go to the recipe:  bash scripts/demo.sh seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
run_dir=runs/demo
for ((number = 2; ; number++)); do
  [ -e "$run_dir" ] || break
  run_dir=runs/demo-$number
done
exec .venv/bin/remix train recipes/embedded/remix_grpo.yaml "run_dir=$run_dir" "$@"
