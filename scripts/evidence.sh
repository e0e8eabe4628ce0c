#!/usr/bin/env bash
# The comparisons behind docs/evidence.md, one command each.
#
#     scripts/evidence.sh PART [MODEL] [DATA]
#
# PART   response-only   LoRA, MoSLoRA, three links (kaiming, orthogonal), three seeds: 12 runs
#        figure2         LoRA and three links with Figure 2's loss over prompt and response, without dropout, three
#                        seeds, and MoSLoRA with one: 10 runs
#        rates           the same loss at learning rates up to 1e-2: LoRA and orthogonal links with one seed, at 3e-3
#                        with three, kaiming links at 3e-3: 11 runs more in figure2's comparison
#        search          one seed of what might make a chain better at 3e-3, with that loss: 7 runs more, and two in
#                        directories of their own, whose chains are rewritten on the way
#        grid            every arm at four learning rates, 500 steps, three seeds: 60 runs, for a GPU
# MODEL  a checkpoint directory or hub id (models/SmolLM2-135M-Instruct)
# DATA   LLM-Adapters' folder dataset/, with boolq/train.json and the like (data/llm_adapters)
#
# A value that stands twice, as in key=3,3, is one arm and leaves the comparison's own recipe as it is.
#
# A part that was stopped continues where it was; a part that is done only prints its tables again. Runs go below
# runs/, or below $OUT. A run of 80 steps sees about 110,000 tokens. The same command started twice shares the runs;
# on a CPU with OMP_NUM_THREADS=1 two processes get more done than one.
set -euo pipefail

part=${1:?"usage: scripts/evidence.sh response-only|figure2|rates|search|grid [MODEL] [DATA]"}
model=${2:-models/SmolLM2-135M-Instruct}
data=${3:-data/llm_adapters}
root=$(cd "$(dirname "$0")/.." && pwd)
linchain=${LINCHAIN:-$root/.venv/bin/linchain}

rows=()
for task in boolq openbookqa ARC-Easy ARC-Challenge; do rows+=("$data/$task/train.json"); done
common=("model.path=$model" "data.train=[$(IFS=,; echo "${rows[*]}")]" "output_dir=${OUT:-runs}")

compare() {  # RECIPE WORD...
    local recipe=$root/configs/$1.yaml
    shift
    "$linchain" compare "$recipe" "${common[@]}" "$@"
}

whole() { compare figure2 adapter.dropout=0 "$@"; }
orthogonal=(adapter.depth=3,3 adapter.init=orthogonal,orthogonal)
lora_and_orthogonal=(adapter.depth=0,3 adapter.init=orthogonal,orthogonal)

case $part in
response-only)
    compare figure2-response-only adapter.depth=0,1,3 --seeds 1,2,3
    compare figure2-response-only adapter.init=kaiming,orthogonal --seeds 1,2,3
    ;;
figure2)
    whole adapter.depth=0,3 adapter.init=kaiming,orthogonal --seeds 1,2,3
    whole adapter.depth=0,1 --seeds 1
    ;;
rates)
    whole "${lora_and_orthogonal[@]}" training.learning_rate=3e-3,3e-3 --seeds 1,2,3
    whole "${lora_and_orthogonal[@]}" training.learning_rate=5e-3,1e-2 --seeds 1
    whole adapter.depth=3,3 adapter.init=kaiming,kaiming training.learning_rate=3e-3,3e-3 --seeds 1
    ;;
search)
    whole "${orthogonal[@]}" training.learning_rate=3e-3,3e-3 training.lr_multiplier.links=3,3 --seeds 1
    whole "${lora_and_orthogonal[@]}" training.learning_rate=1e-3,1e-3 training.lr_multiplier.B=4,4 --seeds 1
    whole adapter.depth=6,6 adapter.init=orthogonal,orthogonal training.learning_rate=3e-3,3e-3 --seeds 1
    whole adapter.depth=3,3 adapter.init=identity,identity training.learning_rate=3e-3,3e-3 --seeds 1
    whole adapter.depth=3,3 adapter.init=kaiming,kaiming adapter.alpha=166,166 --seeds 1  # 32 times √3³
    whole adapter.depth=0,0 training.lr_multiplier.A=3,3 --seeds 1
    for mode in links balance; do
        "$(dirname "$linchain")/python" "$root/scripts/try_refactoring.py" $mode 10 "$root/configs/figure2.yaml" \
            "${common[@]}" adapter.dropout=0 adapter.init=orthogonal training.learning_rate=3e-3 seed=1 name=$mode-10
    done
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
