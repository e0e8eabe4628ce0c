"""RTE, CoLA and BoolQ with a small model: chains, the head alone, full fine-tuning, on all rows and few.

    python -m scripts.glue_runs MODEL --out DIR [--studies all,few] [--processes N] [--seconds S]

The glue directory (RTE/train.tsv and so on) and boolq/train.json are looked for where LINCHAIN_DATA_DIR
says, then on the hub. Every arm is trained at each of its rates on a part of the training rows, and the
rate that tells other training rows best is taken; then it is trained with other seeds and tells the
development set, which had no say in anything. DIR/results.jsonl holds a line per run. Called again it goes
on; `--plan` counts runs and steps, `--table` shows what is done, `--rate` compares arms at one rate, so that
none is chosen. Any number of processes share the runs, also on one GPU, most of which such a small run leaves
idle.

- `all`: every training row; LoRA, MoSLoRA, three links of either start, the head alone, full fine-tuning.
- `few`: 16 to 1,024 training rows, drawn anew for each seed and the same for every arm; depths 0, 1 and 3 as
  they begin by default, and from factors that are all small (deep LoRA, arXiv 2406.04112).

Chains and the head alone are linchain's jobs, optimizer steps and validation, without its checkpoints. Full
fine-tuning is a plain loop over the same rows in the same order with the same schedule, and with the dropout
that the model brings.
"""
