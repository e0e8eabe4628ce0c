#!/usr/bin/env bash
# The comparisons behind docs/evidence.md, one command each.
#
#     scripts/evidence.sh PART [MODEL] [DATA] [KEY=VALUE...]
#
# PART   response-only   LoRA, MoSLoRA, three links (kaiming, orthogonal), three seeds: 12 runs
#        figure2         LoRA and three links with Figure 2's loss over prompt and response, without dropout, three
#                        seeds, and MoSLoRA with one: 10 runs
#        rates           the same loss at learning rates up to 1e-2: LoRA and orthogonal links with one seed, at 3e-3
#                        with three, kaiming links at 3e-3: 11 runs more in figure2's comparison
#        search          one seed of what might make a chain better at 3e-3, with that loss: 7 runs more, and two in
#                        directories of their own, whose chains are rewritten on the way
#        grid            every arm at four learning rates, 500 steps, three seeds: 60 runs, for a GPU
#        accuracy        LoRA and orthogonal links at 3e-3 with Figure 2's loss for 1,400 steps (1.9 million tokens),
#                        three seeds: 6 runs, and what they and the base answer, by either protocol
#        defaults        the same loss: target modules at equal parameters, ranks, and rsLoRA's scale, 160 steps; four
#                        rates with one seed, then three seeds at each arm's best: 42 runs
# MODEL  a checkpoint directory or hub id (models/SmolLM2-135M-Instruct)
# DATA   LLM-Adapters' folder dataset/, with boolq/train.json and the like (data/llm_adapters)
# KEY=VALUE   changes the recipe of every run, whatever the part says, such as data.validation=60
#
# A value that stands twice, as in key=3,3, is one arm and leaves the comparison's own recipe as it is.
#
# Environment, for the last two parts:
#   PROCESSES   how many share the runs (1), such as 12 on a GPU; they write to $OUT/NAME.STAGE-NUMBER.log
#   TIMEOUT     seconds after which they stop: what is finished counts, and the same command goes on (none)
#   STEPS       of a run, in place of those above
#   RATES       of `defaults`, in place of its four; those of a comparison that is begun are joined by these
#   ROWS        of each task that likelihood is measured on (all); WRITTEN, that answers are written to (1000);
#               SUMS, of the arithmetic tasks, which nothing here is trained for (50; 0 leaves them out)
#   LINCHAIN    the command, such as "python3 -m linchain_cli" (.venv/bin/linchain)
#
# A part that was stopped continues where it was; a part that is done only prints its tables again. Runs go below
# runs/, or below $OUT. A run of 80 steps sees about 110,000 tokens. The same command started twice shares the runs;
# on a CPU with OMP_NUM_THREADS=1 two processes get more done than one.
set -euo pipefail

part=${1:?"usage: scripts/evidence.sh response-only|figure2|rates|search|grid|accuracy|defaults [MODEL] [DATA] [KEY=VALUE...]"}
model=${2:-models/SmolLM2-135M-Instruct}
data=${3:-data/llm_adapters}
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-runs}
linchain=("$root/.venv/bin/linchain")
[ -z "${LINCHAIN:-}" ] || read -ra linchain <<<"$LINCHAIN"
python=$(dirname "${linchain[0]}")/python
[ "${#linchain[@]}" = 1 ] || python=${linchain[0]} # python -m linchain_cli

rows=()
for task in boolq openbookqa ARC-Easy ARC-Challenge; do rows+=("$data/$task/train.json"); done
common=("model.path=$model" "data.train=[$(IFS=,; echo "${rows[*]}")]" "output_dir=$out")
own=("${@:4}")

compare() {  # RECIPE WORD...
    local recipe=$root/configs/$1.yaml
    shift
    $exec ${limit[@]+"${limit[@]}"} "${linchain[@]}" compare "$recipe" "${common[@]}" "$@" ${own[@]+"${own[@]}"}
}

exec='' limit=() children=() logs=() failed=0
trap 'kill "${children[@]}" 2>/dev/null; wait; exit 143' TERM # they save what they have

start() {  # COUNT LOG RECIPE WORD...: processes that share a comparison's runs; one alone keeps the terminal
    local count=$1 log=$2 number
    shift 2
    if [ -n "${TIMEOUT:-}" ]; then
        if ((SECONDS >= TIMEOUT)); then
            echo "evidence.sh: no time is left for $log" >&2
            failed=1
            return 1
        fi
        limit=(timeout --kill-after=30 "$((TIMEOUT - SECONDS))")
    fi
    if [ "${PROCESSES:-1}" = 1 ]; then
        compare "$@" || failed=1
        return
    fi
    mkdir -p "$out"
    for ((number = 1; number <= count; number++)); do
        (exec=exec && compare "$@") >"$out/$log-$number.log" 2>&1 & # in the shell's place, to be signalled
        children+=($!) logs+=("$out/$log-$number.log")
    done
}

tables='import json, sys
from linchain_cli.comparison.definition import read_definition
from linchain_cli.comparison.results import collect, lines, write
from linchain_cli.run import ComparisonDirectory

directory = ComparisonDirectory(sys.argv[1])
results = collect(directory, read_definition(directory))
write(directory, results)
with open(directory.path / f"results-{sys.argv[2]}.json", "w") as file:
    json.dump(results, file)
print("\n".join(lines(results, 160)))'

finish() {  # NAME STAGE: waits for those started (one that failed is told, the others go on) and keeps what there is
    local place code stopped=
    for place in "${!children[@]}"; do
        wait "${children[place]}" && continue
        code=$?
        echo "evidence.sh: a process ended with $code, see ${logs[place]}:" >&2
        tail -n 4 "${logs[place]}" >&2
        failed=1
        case $code in 129 | 130 | 143) stopped=$code ;; esac
    done
    children=() logs=()
    [ -z "$stopped" ] || exit "$stopped" # by a signal: whoever sent it wants no further stage
    if [ ! -f "$out/$1/comparison.json" ]; then
        echo "evidence.sh: $2: nothing was begun" >&2
        failed=1
        return
    fi
    "$python" -c "$tables" "$out/$1" "$2" || failed=1
    echo "evidence.sh: $2 done after $SECONDS s, $out/$1/results-$2.json"
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
        "$python" "$root/scripts/try_refactoring.py" $mode 10 "$root/configs/figure2.yaml" \
            "${common[@]}" adapter.dropout=0 adapter.init=orthogonal training.learning_rate=3e-3 seed=1 name=$mode-10 \
            ${own[@]+"${own[@]}"}
    done
    ;;
grid)
    compare figure2-response-only name=grid training.max_steps=500 training.warmup_steps=50 training.eval_every=25 \
        adapter.depth=0,1,3 adapter.init=orthogonal,kaiming training.learning_rate=1e-4,3e-4,1e-3,3e-3 --seeds 1,2,3
    ;;
accuracy)
    steps=${STEPS:-1400}
    trained=(figure2 name=accuracy adapter.dropout=0 "${lora_and_orthogonal[@]}" training.learning_rate=3e-3
        "training.max_steps=$steps" "training.warmup_steps=$(((steps + 13) / 14))"
        "training.eval_every=$(((steps + 13) / 14))" "training.save_every=$steps" training.log_every=10
        training.micro_batch_size=16 "evaluation.data_dir=$data" --seeds 1,2,3)
    asked="evaluation.tasks=[boolq,piqa,ARC-Easy,openbookqa]"
    measure() {  # STAGE WORD...
        local stage=$1
        shift
        start "${PROCESSES:-1}" "accuracy.$stage" "${trained[@]}" "$@" || return 0
        finish accuracy "$stage"
    }
    PROCESSES=$((${PROCESSES:-1} < 7 ? ${PROCESSES:-1} : 7)) # six runs and the base
    measure likelihood "$asked" evaluation.protocol=likelihood ${ROWS:+"evaluation.limit=$ROWS"}
    measure generate "$asked" evaluation.protocol=generate "evaluation.limit=${WRITTEN:-1000}"
    if [ "${SUMS:-50}" != 0 ]; then
        measure sums "evaluation.tasks=[gsm8k,SVAMP]" evaluation.protocol=generate "evaluation.limit=${SUMS:-50}"
    fi
    ;;
defaults)
    steps=${STEPS:-160}
    paper="[q_proj, k_proj, v_proj, up_proj, down_proj]"
    chain() { echo "{rank: $1, alpha: $2, depth: 3, init: orthogonal, dropout: 0, target_modules: ${3:-$paper}}"; }
    # By rank and alpha. rsLoRA's scale, alpha / √rank, is that of alpha / rank with √(rank / 16) of its alpha, where
    # both are taken as equal at rank 16. All linear modules of rank 11 have as many parameters as q, k, v, up and
    # down of rank 16, in SmolLM2.
    declare -A arms=(
        ["16 32"]=$(chain 16 32) ["11 32"]=$(chain 11 32 all-linear)
        ["4 32"]=$(chain 4 32) ["64 32"]=$(chain 64 32) ["4 16"]=$(chain 4 16) ["64 64"]=$(chain 64 64)
    )
    order=("16 32" "11 32" "4 32" "64 32" "4 16" "64 64")
    trained=(figure2 name=defaults adapter.dropout=0 adapter.init=orthogonal "training.max_steps=$steps"
        "training.warmup_steps=$(((steps + 9) / 10))" "training.eval_every=$(((steps + 9) / 10))"
        "training.save_every=$steps" training.log_every=10 training.micro_batch_size=16)
    whole=""
    for arm in "${order[@]}"; do whole+=",${arms[$arm]}"; done
    start "${PROCESSES:-1}" defaults.rates "${trained[@]}" "adapter=${whole#,}" \
        "training.learning_rate=${RATES:-1e-3,2e-3,4e-3,8e-3}" --seeds 0
    finish defaults rates
    best='import json, sys
for row in json.load(open(sys.argv[1]))["tables"]["best_rate"]:
    print(row["rank"], format(row["alpha"], "g"), row["learning_rate"])'
    declare -A at=() count=()
    while read -r rank alpha rate; do
        at[$rate]+=",${arms["$rank $alpha"]}"
        count[$rate]=$((${count[$rate]:-0} + 1))
    done < <("$python" -c "$best" "$out/defaults/results.json")
    for rate in "${!at[@]}"; do
        these=${at[$rate]#,}
        [ "${count[$rate]}" != 1 ] || these+=",$these"
        start $(((${PROCESSES:-1} * ${count[$rate]} + 5) / 6)) "defaults.seeds-$rate" "${trained[@]}" "adapter=$these" \
            "training.learning_rate=$rate,$rate" --seeds 1,2,3 || break
    done
    finish defaults seeds
    ;;
*)
    echo "scripts/evidence.sh: no part is named '$part'" >&2
    exit 2
    ;;
esac
exit "$failed"
