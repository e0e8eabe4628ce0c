"""What other tools call settings: known under their names, and told apart from ours."""

from __future__ import annotations

import pytest

from linchain_cli.recipe import Recipe
from linchain_cli.recipe.other_tools import (
    CALLED_HERE,
    NOT_NEEDED,
    NOT_THERE,
    SAID_OTHERWISE,
    is_known,
    said_of,
)
from linchain_cli.recipe.validation import dotted_fields


def test_what_other_tools_call_settings_is_a_field_here_and_no_name_of_ours():
    fields = set(dotted_fields(Recipe))
    assert set(CALLED_HERE.values()) <= fields
    own = {part for field in fields for part in field.split(".")}
    assert own & CALLED_HERE.keys() <= {"template"}
    tables = (CALLED_HERE, SAID_OTHERWISE, NOT_NEEDED, NOT_THERE)
    for number, table in enumerate(tables):
        assert number == 0 or not [name for name in own if said_of(name, table)]
        others = [other for other in tables if other is not table]
        assert not [name for name in table if any(name in other for other in others)]


# What is set most often in the examples of Axolotl and LLaMA-Factory, and on TRL's command line.
OFTEN = """
base_model datasets val_set_size output_dir sequence_len sample_packing pad_to_sequence_len lora_r
lora_alpha lora_dropout lora_target_linear lora_target_modules lora_model_dir wandb_project wandb_entity
wandb_watch wandb_name wandb_log_model gradient_accumulation_steps num_epochs bf16 fp16 tf32 load_in_4bit
load_in_8bit resume_from_checkpoint logging_steps flash_attention attn_implementation warmup_ratio
evals_per_epoch saves_per_epoch special_tokens chat_template plugins model_type tokenizer_type
trust_remote_code dataset_prepared_path deepspeed fsdp fsdp_config eot_tokens
gradient_checkpointing_kwargs save_safetensors group_by_length early_stopping_patience
lora_modules_to_save neftune_noise_alpha flash_attn_rms_norm lora_mlp_kernel liger_rope model_name_or_path
stage do_train finetuning_type lora_rank lora_target dataset template cutoff_len max_samples
preprocessing_num_workers dataloader_num_workers plot_loss overwrite_output_dir save_only_model report_to
per_device_train_batch_size num_train_epochs lr_scheduler_type ddp_timeout save_steps overwrite_cache
val_size per_device_eval_batch_size eval_strategy eval_steps quantization_bit dataset_name use_peft
push_to_hub lora_task_type save_strategy packing completion_only_loss assistant_only_loss use_dora
use_rslora random_state max_seq_length use_gradient_checkpointing modules_to_save init_lora_weights
label_smoothing_factor optim save_total_limit load_best_model_at_end
""".split()


@pytest.mark.parametrize("key", OFTEN)
def test_what_is_set_often_is_known(key):
    assert is_known(key) or key in Recipe.model_fields
