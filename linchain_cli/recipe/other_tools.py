"""What Axolotl, LLaMA-Factory, TRL, Unsloth, PEFT and transformers call settings that recipes have, too."""

from __future__ import annotations

# Their key, and where the setting stands in a recipe.
CALLED_HERE = {
    **dict.fromkeys(("run_name", "experiment_name", "wandb_name"), "name"),
    **dict.fromkeys(
        ("base_model", "model_name_or_path", "model_name", "pretrained_model_name_or_path", "model_id"),
        "model.path",
    ),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "compute_dtype", "precision"), "model.dtype"),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization_config"), "model.quantization"
    ),
    **dict.fromkeys(("flash_attention", "flash_attn", "attn_implementation"), "model.attention"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "adapter.rank"),
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    **dict.fromkeys(
        ("lora_target", "lora_target_modules", "lora_target_linear", "target"), "adapter.target_modules"
    ),
    **dict.fromkeys(
        ("datasets", "dataset", "dataset_name", "dataset_path", "data_path", "train_file"), "data.train"
    ),
    **dict.fromkeys(("val_set_size", "val_size", "test_datasets", "eval_dataset"), "data.validation"),
    **dict.fromkeys(
        ("sequence_len", "cutoff_len", "max_seq_length", "max_seq_len", "model_max_length"),
        "data.max_length",
    ),
    **dict.fromkeys(("template", "prompt_template", "type"), "data.template"),
    "chat_template": "data.chat.template",
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "training.epochs"),
    **dict.fromkeys(("per_device_train_batch_size", "batch_size"), "training.micro_batch_size"),
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.lr_scheduler",
    "warmup_ratio": "training.warmup_steps",
    "optim": "training.optimizer",
    "logging_steps": "training.log_every",
    "eval_steps": "training.eval_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep_checkpoints",
    "load_best_model_at_end": "training.keep",
    "metric_for_best_model": "training.best_by",
    "early_stopping_patience": "training.early_stopping",
    "torch_compile": "training.compile",
    **dict.fromkeys(("report_to", "wandb_project", "use_wandb"), "training.trackers"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "training.parallel"),
}

# Settings that a recipe has no key for, and what there is in their place.
NOT_HERE = {
    "gradient_accumulation_steps": "training.global_batch_size counts the rows of a step, over all processes "
    "and micro-batches",
    **dict.fromkeys(
        ("packing", "sample_packing", "group_by_length", "pad_to_sequence_len", "padding_free"),
        "leave it out: rows of like length are read together",
    ),
    **dict.fromkeys(("overwrite_output_dir",), "linchain train --fresh replaces a run"),
    **dict.fromkeys(
        ("resume_from_checkpoint", "auto_resume_from_checkpoints"), "linchain train --resume continues a run"
    ),
    **dict.fromkeys(
        ("stage", "do_train", "finetuning_type", "peft_type", "task_type", "adapter_type"),
        "leave it out: an adapter is trained on what rows say",
    ),
    "ds_type": "leave it out: a file's ending tells how it is read",
    "trust_remote_code": "leave it out: no code that comes with a model is run",
}
