#!/usr/bin/env bash
# The comparisons behind docs/evidence.md, one command each.
#
#     scripts/evidence.sh PART [MODEL] [DATA]
#
# PART   response-only   LoRA, MoSLoRA, three links (kaiming, orthogonal), three seeds: 12 runs
#        figure2         the same arms with Figure 2's loss over prompt and response, one seed, without dropout: 4 runs
#        search          one seed of what might make a chain better, each beside LoRA with the same change where it
#                        has a meaning for LoRA: 21 runs more in response-only's comparison
#        survivors       two more seeds of the arms that are named: survivors key=value,value ... (see below)
#        grid            every arm at four learning rates, 500 steps, three seeds: 60 runs, for a GPU
# MODEL  a checkpoint directory or hub id (models/SmolLM2-135M-Instruct)
# DATA   LLM-Adapters' folder dataset/, with boolq/train.json and the like (data/llm_adapters)
#
# For survivors the environment variables MODEL and DATA take the place of the arguments, since arms follow:
#     scripts/evidence.sh survivors adapter.depth=0,3 training.learning_rate=3e-4,3e-3
#
# A part that was stopped continues where it was; a part that is done only prints its tables again. Runs go below
# runs/, or below $OUT. A run of 80 steps sees about 110,000 tokens. The same command started twice shares the runs;
# on a CPU with OMP_NUM_THREADS=1 two processes get more done than one.
set -euo pipefail

part=${1:?"usage: scripts/evidence.sh response-only|figure2|search|survivors|grid [MODEL] [DATA]"}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
if [ "$part" != survivors ]; then
    MODEL=${1:-${MODEL:-models/SmolLM2-135M-Instruct}}
    DATA=${2:-${DATA:-data/llm_adapters}}
fi
model=${MODEL:-models/SmolLM2-135M-Instruct}
data=${DATA:-data/llm_adapters}
linchain=${LINCHAIN:-$root/.venv/bin/linchain}

rows=()
for task in boolq openbookqa ARC-Easy ARC-Challenge; do rows+=("$data/$task/train.json"); done
common=("model.path=$model" "data.train=[$(IFS=,; echo "${rows[*]}")]" "output_dir=${OUT:-runs}")

compare() {  # RECIPE WORD...
    local recipe=$root/configs/$1.yaml
    shift
    "$linchain" compare "$recipe" "${common[@]}" "$@"
}

case $part in
response-only)
    compare figure2-response-only adapter.depth=0,1,3 --seeds 1,2,3
    compare figure2-response-only adapter.init=kaiming,orthogonal --seeds 1,2,3
    ;;
figure2)
    compare figure2 adapter.dropout=0 adapter.depth=0,1,3 --seeds 1
    compare figure2 adapter.dropout=0 adapter.init=kaiming,orthogonal --seeds 1
    ;;
search)
    both=(adapter.depth=0,3 adapter.init=kaiming,orthogonal)
    compare figure2-response-only "${both[@]}" training.learning_rate=3e-4,1e-3,3e-3 --seeds 1
    compare figure2-response-only "${both[@]}" training.lr_multiplier.B=1,4 --seeds 1
    compare figure2-response-only "${both[@]}" adapter.alpha=32,64 --seeds 1
    compare figure2-response-only adapter.init=kaiming,orthogonal training.lr_multiplier.links=1,3,10 --seeds 1
    compare figure2-response-only adapter.depth=2,6 adapter.init=kaiming,orthogonal --seeds 1
    compare figure2-response-only adapter.init=kaiming,identity --seeds 1
    ;;
survivors)
    compare figure2-response-only "$@" --seeds 2,3
    ;;
grid)
    compare figure2-response-only name=grid training.max_steps=500 training.warmup_steps=50 training.eval_every=25 \
        adapter.depth=0,1,3 adapter.init=orthogonal,kaiming training.learning_rate=1e-4,3e-4,1e-3,3e-3 --seeds 1,2,3
    ;;
*)
    echo "scripts/evidence.sh: no part is named '$part'" >&2
    exit 2
    ;;
esac
