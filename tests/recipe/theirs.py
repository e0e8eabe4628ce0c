"""Configurations of other tools, each with much of what theirs say."""

from __future__ import annotations

AXOLOTL = """
base_model: org/model
load_in_4bit: true
datasets:
  - {path: rows.jsonl, type: alpaca, split: train}
  - path: org/chats
    name: en
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
  - {path: old.jsonl, type: jeopardy, shards: 3, message_property_mappings: {role: who}}
val_set_size: 0.05
output_dir: ./outputs/my run
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
wandb_project: mine
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
attn_implementation: flash_attention_2
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: </s>}
chat_template: tokenizer_default
"""
LLAMA_FACTORY = """
model_name_or_path: org/model
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: one,two
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/run/sft
logging_steps: 10
save_steps: 500
overwrite_output_dir: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
neftune_noise_alpha: 5
val_size: 0
"""
TRL = """
model_name_or_path: org/model
dataset_name: org/rows
dataset_config: en
use_peft: true
lora_r: 16
lora_alpha: 64
use_rslora: true
max_length: 1024
max_steps: 100
num_train_epochs: 3
eval_strategy: epoch
load_best_model_at_end: true
report_to: [wandb, tensorboard]
assistant_only_loss: false
"""
V1 = """
model: org/model
model_class: llm
peft_config: {name: lora, r: 4, lora_alpha: 8, target_modules: all}
quant_config: {name: bnb, quantization_bit: 4}
train_dataset: rows.jsonl
output_dir: ./outputs/v1
micro_batch_size: 2
learning_rate: 1.0e-5
save_epochs: 0.5
"""
