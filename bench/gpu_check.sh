#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, for a machine without a network: bench/gpu_check.sh [all | STAGE...]
#
# Stages, each meant to end within ten minutes; without a name those down to `decoding`:
#   build      the compiled parts, in place, for this GPU, and every Triton kernel, whose registers are checked
#   tests      the tests marked `gpu`, then the contract tests on the GPU's backends
#   sanitizer  compute-sanitizer: memcheck, racecheck, initcheck, synccheck on small shapes
#   kernels    bench/gpu_kernels.py: time of a step, cold and warm, against baselines and the copy bandwidth
#   linear     bench/gpu_linear.py: a linear layer with a LoRA ARM, in one launch, by PyTorch, and the base's rows alone
#   decoding   bench/tokens_per_second.py: tokens/s of 7B + 7B, 7B + LoRA, 7B + 1B and 8B + 1B shapes, each switch apart
#   batches    the same at batches 8 and 128
#   compiled   the same with compiled forwards
#   profile    a decoding step's timeline (bench/decoder_profile.py); hardware counters of the sampling kernels, where
#              Nsight Compute is and may read them (bench/kernel_counters.py)
#   tune       the kernels at other shapes of launch
# A log of each, the JSON files and the plots go to OUT (default bench/results/<device>); a short table is printed last.
# PYTHON (python3), GENARM_COMMIT (where there is no git) and KERNELS_ARGS (--quick) may be set.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=".:python${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
device=$($PYTHON -c '
import torch
print(torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-"))') || exit 1
OUT=${OUT:-bench/results/$device}
mkdir -p "$OUT"

stage_build() {
  local arch
  arch=$($PYTHON -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')
  GENARM_CPU=1 GENARM_CUDA=1 GENARM_CUDA_ARCHS=$arch $PYTHON setup.py --quiet build_ext --inplace || return 1
  # Every Triton kernel into the cache on disk, on all cores; the tests would compile them one after another.
  $PYTHON -m bench.triton_resources --all --arch "$arch" | grep -v '"ok": true'
  return "${PIPESTATUS[0]}"
}

stage_tests() {
  local failed=0
  $PYTHON -m pytest -q -m gpu tests || failed=1
  GENARM_EXPECT_BACKENDS=triton,cuda \
    $PYTHON -m pytest -q -k "triton or cuda" tests/contract tests/backends/test_triton.py || failed=1
  return $failed
}

stage_sanitizer() {
  local failed=0 tool
  $PYTHON -m bench.small_steps || return 1         # right, and compiled outside the tool
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1          # every tensor has bounds of its own
  for tool in memcheck racecheck initcheck synccheck; do # racecheck: shared memory alone
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 7 $PYTHON -m bench.small_steps --unchecked || failed=1
  done
  return $failed
}

stage_kernels() { $PYTHON -m bench.gpu_kernels --out "$OUT" ${KERNELS_ARGS:-}; }

stage_linear() { $PYTHON -m bench.gpu_linear --out "$OUT"; }

tokens() { $PYTHON -m bench.tokens_per_second --device cuda --rounds 2 --out "$OUT" "$@"; }

methods() { printf -- '--method %s ' "$@"; }

# LoRA ARMs need PEFT and accelerate.
stage_decoding() {
  local failed=0 batches='--batch 1 --batch 32' all
  all=$(methods transformers naive base genarm no-graph no-streams neither)
  tokens --base llama-7b --arm llama-7b --batch 1 $all || failed=1
  tokens --base llama-7b --arm lora:8 $batches $(methods base genarm separate) || failed=1
  tokens --base llama-7b --arm llama-1b --batch 1 $(methods transformers genarm) || failed=1
  tokens --base llama-8b --arm llama-1b $batches $(methods base genarm no-graph no-streams) || failed=1
  return $failed
}

stage_batches() {
  OUT=$OUT/batches tokens --base llama-8b --arm llama-1b --batch 8 --batch 128 $(methods naive genarm)
}

stage_compiled() {
  local failed=0 OUT=$OUT/compiled
  tokens --base llama-7b --arm llama-7b --batch 1 $(methods genarm compile) || failed=1
  tokens --base llama-8b --arm llama-1b --batch 1 --batch 32 $(methods genarm compile) || failed=1
  tokens --base llama-7b --arm lora:8 --batch 1 $(methods base genarm compile) || failed=1
  return $failed
}

# A table of what ncu finds; one line where it is missing or refused the counters, which is no failure.
counters() {
  local found
  command -v ncu >/dev/null || { echo "no hardware counters: ncu is not on the PATH"; return 0; }
  $PYTHON -m bench.kernel_counters || return 1 # it runs, and is compiled outside the tool
  found=$(mktemp)
  timeout 240 ncu --clock-control none --profile-from-start off --nvtx --csv --page raw --print-units base \
    --metrics "$($PYTHON -m bench.kernel_counters --metrics)" --log-file "$found" $PYTHON -m bench.kernel_counters
  if grep -q '^"[0-9]' "$found"; then
    grep '^"' "$found" >"$OUT/counters.csv"
    $PYTHON -m bench.kernel_counters --table "$OUT/counters.csv"
  else
    echo "no hardware counters: $(grep -m 1 '==ERROR==' "$found" || echo "ncu measured no kernel")"
  fi
}

profile() { $PYTHON -m bench.decoder_profile --batch 1 --batch 32 --out "$OUT" "$@"; }

stage_profile() {
  local failed=0
  profile --base llama-7b --arm lora:8 $(methods base genarm) || failed=1
  profile --base llama-8b --arm llama-1b $(methods genarm no-streams) || failed=1
  counters || failed=1
  return $failed
}

stage_tune() {
  local failed=0
  $PYTHON -m bench.gpu_linear --out "$OUT" --tune || failed=1
  $PYTHON -m bench.gpu_kernels --out "$OUT" --tune || failed=1
  return $failed
}

default="build tests sanitizer kernels linear decoding"
[ $# -gt 0 ] || set -- $default
[ "$1" != all ] || set -- $default batches compiled profile tune
summary="" failed=0
for stage in "$@"; do
  declare -F "stage_$stage" >/dev/null || { echo "no stage $stage; see the head of $0" >&2; exit 2; }
  start=$SECONDS
  stage_"$stage" 2>&1 | tee "$OUT/$stage.log" && result=passed || { result=FAILED; failed=1; }
  summary+=$(printf '%-10s %-7s %4d s  %s' "$stage" "$result" $((SECONDS - start)) "$OUT/$stage.log")$'\n'
done
printf '\n%s' "$summary"
exit $failed
