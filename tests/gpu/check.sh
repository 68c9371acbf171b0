#!/usr/bin/env bash
# Check hf_evopress on a machine with a card, in about five minutes, and print what steps take.
#
#   tests/gpu/check.sh              the first GPU
#   tests/gpu/check.sh cuda:1
#   tests/gpu/check.sh sim --small  the second device of the tests, its smallest form, for CI
#
# Run it in the repository, with the Python that hf_evopress is installed in first on the PATH.
set -euo pipefail
cd "$(dirname "$0")/../.."
device="${1:-cuda}"
small="${2:-}"
python="${PYTHON:-python}"
export HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
model="${MODEL:-.cache/SmolLM2-135M-Instruct}"

case "$device" in
    cuda*) "$python" -c "import torch; print('card:', torch.cuda.get_device_name('$device'))" ;;
    *) echo "device: $device" ;;
esac

if [ "$small" != --small ]; then
    # the tests with a device fixture, on the card
    "$python" -m pytest -q -m gpu -p no:cacheprovider
    case "$device" in
        cuda*) "$python" -m pytest -q tests/loading/test_triton.py -p no:cacheprovider ;;
    esac
fi

"$python" -m tests.gpu.line --device "$device" --size tiny
if [ "$small" != --small ]; then
    "$python" -m tests.gpu.line --device "$device" --size tiny --offload cpu
    if [ -f "$model/config.json" ]; then
        "$python" -m tests.gpu.line --device "$device" --model "$model"
    fi
    "$python" -m tests.gpu.line --device "$device" --size 1B
    "$python" -m tests.gpu.line --device "$device" --size 1B --offload cpu
    "$python" tests/benchmarks/gpu_kernels.py --device "$device" --tokens 1 16 512
    "$python" tests/benchmarks/trellis.py gaussian --device "$device" --tiles 65536 --state-bits 12
    OMP_NUM_THREADS=2 "$python" tests/benchmarks/trellis.py gaussian --threads 2 --state-bits 12
    "$python" tests/benchmarks/scale.py --device "$device" --size 135M --size 1B --size 8B
fi
