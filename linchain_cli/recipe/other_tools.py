"""What Axolotl, LLaMA-Factory, TRL, Unsloth, PEFT and transformers call settings: where each stands in a
recipe, or what there is in its place.

A `*` stands for any letters. docs/coming-from.md is generated from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Tool:
    """Another tool: the settings by which its configurations are known, and what it does where they leave
    something open that changes what is learned."""

    name: str
    marks: tuple[str, ...]
    defaults: Mapping[str, str]


AXOLOTL = Tool(
    "Axolotl",
    ("base_model",),
    {
        "num_epochs": "1",
        "micro_batch_size": "1",
        "lr_scheduler": "cosine",
        "warmup_ratio": "0.03",
        "sequence_len": "512",
        "excess_length_strategy": "drop",
        "val_set_size": "0",
    },
)
LLAMA_FACTORY_V1 = Tool(
    "LLaMA-Factory v1",
    ("train_dataset", "model_class"),
    {
        "num_train_epochs": "3",
        "micro_batch_size": "1",
        "learning_rate": "1e-4",
        "lr_scheduler_type": "constant",
        "cutoff_len": "2048",
        "val_size": "0",
        "lora_rank": "8",
        "lora_alpha": "16",
        "lora_dropout": "0.05",
    },
)
LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    ("stage", "finetuning_type", "template", "cutoff_len", "dataset", "dataset_dir", "lora_target"),
    {
        "finetuning_type": "lora",
        "num_train_epochs": "3",
        "per_device_train_batch_size": "8",
        "learning_rate": "5e-5",
        "lr_scheduler_type": "linear",
        "warmup_ratio": "0",
        "cutoff_len": "2048",
        "val_size": "0",
        "lora_rank": "8",
        "lora_dropout": "0",
    },
)
TRL = Tool(
    "TRL",
    (),  # and whatever else goes through transformers' Trainer
    {
        "num_train_epochs": "3",
        "per_device_train_batch_size": "8",
        "learning_rate": "2e-5",
        "lr_scheduler_type": "linear",
        "warmup_ratio": "0",
        "max_length": "1024",
        "lora_r": "16",
        "lora_alpha": "32",
        "lora_dropout": "0.05",
    },
)
TOOLS = (AXOLOTL, LLAMA_FACTORY_V1, LLAMA_FACTORY, TRL)


def _each(said: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), said)


# Their key, and where the setting stands in a recipe.
CALLED_HERE = {
    **_each("name", "run_name experiment_name wandb_name"),
    **_each("seed", "random_state"),
    **_each("model.path", "base_model model_name_or_path model_name pretrained_model_name_or_path model_id"),
    **_each("model.revision", "revision_of_model model_revision"),
    **_each(
        "model.dtype",
        "bf16 fp16 bfloat16 float16 float32 pure_bf16 torch_dtype compute_dtype precision",
    ),
    **_each("model.quantization", "load_in_4bit load_in_8bit quantization_bit quantization_config"),
    **_each(
        "model.attention",
        "attn_implementation flash_attention flash_attn sdp_attention eager_attention flex_attention "
        "xformers_attention",
    ),
    **_each("adapter.rank", "lora_r lora_rank r"),
    **_each("adapter.alpha", "lora_alpha"),
    **_each("adapter.dropout", "lora_dropout"),
    **_each(
        "adapter.target_modules",
        "lora_target lora_target_modules lora_target_linear lora_target_parameters target_parameters target",
    ),
    **_each("adapter.init_from", "lora_model_dir adapter_name_or_path"),
    **_each(
        "data.train",
        "datasets dataset train_dataset dataset_name dataset_path data_path train_file pretraining_dataset",
    ),
    **_each("data.split", "dataset_train_split"),
    **_each(
        "data.columns",
        "field_messages field_instruction field_input field_output field_system field_tools field "
        "dataset_text_field text_column",
    ),
    **_each(
        "data.validation",
        "val_set_size val_size test_datasets eval_dataset dataset_test_split eval_split test_split_size",
    ),
    **_each("data.max_length", "sequence_len cutoff_len max_seq_length max_seq_len model_max_length"),
    **_each("data.on_long_row", "excess_length_strategy truncation_mode"),
    **_each("data.template", "template prompt_template type formatting"),
    **_each(
        "data.chat.template", "chat_template chat_template_jinja chat_template_path custom_chat_template"
    ),
    **_each("data.chat.options", "chat_template_kwargs enable_thinking"),
    **_each("data.chat.system", "default_system default_system_message"),
    **_each("data.turns", "mask_history train_on_last_step_only"),
    **_each("data.train_on_inputs", "train_on_prompt completion_only_loss assistant_only_loss"),
    **_each("training.epochs", "num_epochs num_train_epochs"),
    **_each("training.micro_batch_size", "per_device_train_batch_size auto_find_batch_size"),
    **_each("training.global_batch_size", "batch_size"),
    **_each("training.learning_rate", "lr"),
    **_each("training.lr_scheduler", "lr_scheduler_type"),
    **_each("training.min_lr_ratio", "cosine_min_lr_ratio"),
    **_each("training.warmup_steps", "warmup_ratio"),
    **_each("training.lr_multiplier.B", "loraplus_lr_ratio"),
    **_each("training.optimizer", "optim"),
    **_each(
        "training.gradient_checkpointing",
        "use_gradient_checkpointing activation_checkpointing enable_activation_checkpointing "
        "disable_gradient_checkpointing",
    ),
    **_each("training.offload_activations", "activation_offloading"),
    **_each("training.deterministic", "full_determinism"),
    **_each("training.log_every", "logging_steps logging_strategy"),
    **_each("training.eval_every", "eval_steps evals_per_epoch eval_strategy evaluation_strategy"),
    **_each("training.save_every", "save_steps save_epochs saves_per_epoch save_strategy"),
    **_each("training.keep_checkpoints", "save_total_limit"),
    **_each("training.keep", "load_best_model_at_end"),
    **_each("training.best_by", "metric_for_best_model"),
    **_each("training.early_stopping", "early_stopping_patience early_stopping_steps"),
    **_each("training.compile", "torch_compile"),
    **_each(
        "training.trackers",
        "report_to wandb_project use_wandb use_tensorboard use_mlflow use_comet use_trackio use_swanlab",
    ),
    **_each("training.parallel", "deepspeed fsdp fsdp_config dp_shard_size dp_replicate_size"),
}

# What a recipe says in another way than by one key, or a command does.
SAID_OTHERWISE = {
    "gradient_accumulation_steps": "training.global_batch_size counts the rows of a step, over all processes "
    "and micro-batches",
    **_each("alpha times the root of the rank is the same as adapter.alpha", "use_rslora peft_use_rslora"),
    **_each(
        "adapter.target_modules takes a regular expression over the module's path",
        "exclude_modules layers_to_transform layers_pattern peft_layers_to_transform peft_layers_pattern",
    ),
    "layer_offloading": "training.offload_base, with training.parallel: shard",
    **_each("max_rows beside a source's path takes the first ones", "max_samples num_samples"),
    **_each("split: train[:10%] beside a source's path takes a part", "dataset_shard_num dataset_shard_idx"),
    "create_new_adapter": "linchain merge writes a base with the adapter in it, to train another one on",
    **_each("config beside a source's path", "dataset_config subset"),
    "dataset_dir": "data sets go by their file or hub id; linchain recipes convert reads dataset_info.json",
    **_each("weight beside a source's path", "interleave_probs mix_strategy fraction"),
    **_each("human, user, gpt, assistant, tool and the like are known roles", "roles"),
    **_each("a turn with `train: false` in the row is not learned", "roles_to_train message_field_training"),
    "overwrite_output_dir": "linchain train --fresh replaces a run",
    **_each("linchain train --resume continues a run", "resume_from_checkpoint auto_resume_from_checkpoints"),
    **_each("linchain push RUN OWNER/NAME", "push_to_hub hub_*"),
    **_each("linchain merge writes the merged checkpoint", "merge_lora export_*"),
    **_each(
        "evaluation.tasks are evaluated at the end, linchain eval does it at any time",
        "do_predict predict_with_generate do_causal_lm_eval eval_causal_lm_metrics eval_max_new_tokens "
        "eval_table_size do_bench_eval bench_*",
    ),
    **_each(
        "trackers read their own environment variables (WANDB_PROJECT, WANDB_ENTITY, MLFLOW_TRACKING_URI)",
        "wandb_* mlflow_* comet_* swanlab_* trackio_* project",
    ),
    **_each(
        "linchain train starts one process per GPU, and --nproc or torchrun as many as they are told",
        "use_ray ray_*",
    ),
}

# What needs no setting, and why.
NOT_NEEDED = {
    **_each(
        "rows of like length are read together",
        "packing packing_strategy sample_packing* eval_sample_packing eval_packing neat_packing "
        "multipack_* pretrain_multipack_* max_packed_sequence_len group_by_length pad_to_* padding_free "
        "batch_flattening block_diag_attn batching_strategy batching_workers train_sampling_strategy",
    ),
    **_each(
        "rows are encoded once, on all cores, and found again by their content",
        "dataset_prepared_path dataset_num_proc dataset_processes dataset_keep_in_memory preprocessing_* "
        "overwrite_cache tokenized_path streaming* dataset_streaming buffer_size dataloader_* "
        "shuffle_merged_datasets shuffle_before_merging_datasets num_dataset_shards_to_save "
        "data_shared_file_system skip_prepare_dataset shuffle_dataset is_preprocess "
        "remove_unused_columns",
    ),
    "ds_type": "a file's ending tells how it is read",
    **_each(
        "role and content, from and value are read alike",
        "message_property_mappings message_field_role message_field_content tags",
    ),
    **_each(
        "reasoning_content, reasoning and thinking are read alike",
        "field_thinking template_thinking_key split_thinking",
    ),
    **_each(
        "an adapter is trained on what rows say",
        "stage do_train do_eval finetuning_type peft_type task_type lora_task_type adapter_type use_peft "
        "inference_mode model_class",
    ),
    "trust_remote_code": "no code that comes with a model is run",
    **_each(
        "the model's own files say it",
        "model_type tokenizer_type base_model_config tokenizer_use_* tokenizer_legacy is_*_derived_model "
        "lora_fan_in_fan_out fan_in_fan_out use_fast_tokenizer base_model_ignore_patterns strict "
        "tool_format "
        "experts_implementation llama4_linearized_experts remote_code_revision",
    ),
    **_each(
        "what a device has is used, and linchain has fast paths of its own",
        "plugins liger_* use_liger_kernel enable_liger_kernel cut_cross_entropy *_kernel use_kernels "
        "use_unsloth* flash_attn_* flash_optimum tf32 tiled_mlp* torch_compile_* use_scattermoe use_sonicmoe "
        "chunked_cross_entropy* fused_attn_kernel use_dsv4_kernels use_glm_dsa_kernels use_v1_kernels "
        "kernel_config use_kt kt_* sage_attention sdpa_varlen large_head_attention gemma4_hybrid_attn_impl "
        "deepcompile cuda_*",
    ),
    **_each(
        "processes are started and joined by linchain or torchrun; training.parallel says how they share the "
        "base",
        "ddp ddp_* local_rank world_size dist_config dist_timeout init_config fsdp_* device_map "
        "low_cpu_mem_usage qlora_sharded_model_loading accelerator_config max_memory "
        "experimental_skip_move_to_device torchdistx_path lora_on_cpu",
    ),
    **_each(
        "model.quantization says it: nf4 (doubly quantised) or int8",
        "bnb_* double_quantization quantization_method quantization_type quantization_device_map "
        "use_bnb_nested_quant load_in_16bit gptq* model_quantization_config*",
    ),
    **_each(
        "the base stays frozen", "freeze_vision_tower freeze_multi_modal_projector freeze_language_model "
        "freeze_mm_modules"
    ),
    **_each("the model decides it", "gradient_checkpointing_kwargs use_reentrant_gc use_cache upcast_*"),
    **_each("adapters and checkpoints are safetensors, with all that a resume needs", "save_safetensors "
            "save_only_model save_first_step save_ckpt_as_hf save_on_each_node tokenizer_save_jinja_files"),
    **_each("each source of the validation rows has its loss", "eval_on_each_dataset"),
    **_each("validation takes what fits, as training does", "eval_batch_size per_device_eval_batch_size "
            "eval_accumulation_steps eval_on_start bf16_full_eval fp16_full_eval prediction_loss_only"),
    **_each("every run has loss.png, metrics.jsonl and rows.jsonl", "plot_loss include_* logging_first_step "
            "log_level* log_on_each_node disable_tqdm debug profiler_* enable_torch_profiler "
            "use_otel_metrics otel_*"),
    **_each("a loss that is not finite stops the run, its checkpoints stay", "loss_watchdog_* "
            "logging_nan_inf_filter"),
    **_each("the token that ends an answer is learned with it", "eot_tokens train_on_eos train_on_eot"),
    **_each("seed and data.split_seed draw all there is to draw", "data_seed"),
    **_each("memory is given back by itself", "gc_steps gc_collect_steps torch_empty_cache_steps"),
    **_each("best_by knows which way is better", "greater_is_better"),
    **_each("the loss counts every learned token of a step alike", "average_tokens_across_devices"),
    **_each("it is about inference", "infer_backend infer_dtype sample_backend"),
    **_each("huggingface_hub's login and HF_TOKEN are used", "hf_use_auth_token hf_hub_token token"),
}  # fmt: skip

# What linchain does not have.
NOT_THERE = {
    **_each(
        "not here: all modules of the base stay frozen, embeddings and head too, and no tokens are added",
        "lora_modules_to_save modules_to_save additional_target tokens add_tokens add_special_tokens "
        "additional_special_tokens added_tokens_overrides resize_* new_special_tokens_config "
        "init_special_tokens trainable_token_indices peft_trainable_token_indices embedding_lr* "
        "unfrozen_parameters freeze_trainable_* freeze_extra_modules reinit_weights train_from_scratch "
        "full_finetuning "
        "loraplus_lr_embedding fix_untrained_tokens",
    ),
    **_each(
        "not here: the tokenizer's own are used; padding needs none", "special_tokens eos_token pad_token"
    ),
    **_each("not here: another tokenizer than the model's", "tokenizer_config"),
    **_each("not here: noise on embeddings (NEFTune)", "neftune_noise_alpha noisy_embedding_alpha"),
    **_each("not here: DoRA", "use_dora peft_use_dora"),
    **_each(
        "not here: B starts at zero, adapter.init says how links start",
        "pissa_* loftq_* init_lora_weights peft_init_lora_weights eva_config corda_config",
    ),
    **_each("not here: all modules have one rank and one alpha", "*rank_pattern *alpha_pattern"),
    **_each("not here: experts keep their 16 bits, whatever model.quantization is", "quantize_moe_experts"),
    **_each("not here: biases stay frozen", "bias lora_bias"),
    **_each(
        "not here: AdamW is the only optimizer, with betas of 0.9 and 0.999",
        "adam_* optim_args optim_target_modules use_galore galore_* use_apollo apollo_* use_badam badam_* "
        "use_muon use_adam_mini lr_groups dion_* qgalore_*",
    ),
    **_each(
        "not here: after warm-up the rate falls to training.min_lr_ratio or stays",
        "lr_scheduler_kwargs cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor "
        "relora* jagged_restart_* lisa_*",
    ),
    **_each("not here: the loss is cross-entropy alone", "label_smoothing_factor loss_type use_*_loss "
            "asft_alpha use_eaft eaft_* router_aux_loss_coef moe_aux_loss_coef diffusion"),
    **_each(
        "not here: other methods than low-rank chains",
        "oft_* use_llama_pro mixture_of_depths module_dropout layer_replication qat fp8* nvfp4_* "
        "use_onebitllms llmcompressor",
    ),
    **_each(
        "not here: preference training and RL",
        "rl trl field_chosen field_rejected reward_model* process_reward_model pref_* dpo_* kto_* beta "
        "ref_model* vllm* ebft rl_beta orpo_alpha simpo_gamma cpo_alpha ppo_* ld_alpha num_labels "
        "center_rewards_coefficient",
    ),
    **_each("not here: text alone is learned", "processor_type processor_kwargs image_* video_* audio_* "
            "media_dir"),
    **_each(
        "not here: rows are not split over devices, nor are matrices",
        "context_parallel_size sequence_parallel_degree tensor_parallel_size expert_parallel_* "
        "heads_k_stride ring_attn_func dp_size cp_size cp_mode mp_replicate_size mp_shard_size use_mca "
        "use_megatron_bridge megatron_bridge_args use_hyper_parallel",
    ),
    **_each("not here: the model is what its config.json says", "rope_scaling shift_attn s2_attention "
            "overrides_of_model_* model_config model_init_kwargs flex_attn_* scaling_softmax* use_pose "
            "pose_* peft"),
    **_each("not here: rows come in an order drawn from seed", "curriculum_sampling disable_shuffling "
            "sample_packing_sequentially"),
    **_each("not here: rows that occur twice stay", "dataset_exact_deduplication"),
}  # fmt: skip

# What a setting says that is so here, too.
SAME_HERE: dict[str, float | str] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    **dict.fromkeys(
        (
            *("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"),
            *("expert_parallel_size", "dp_size", "cp_size", "mp_replicate_size"),
        ),
        1.0,
    ),
    "init_lora_weights": "true",
    "loss_type": "nll",
    "mix_strategy": "concat",
}


def said_of(key: str, table: Mapping[str, str]) -> str | None:
    """What a table says of a key, by its name or else by the first `*` that fits."""
    if key in table:
        return table[key]
    return next((said for name, said in table.items() if "*" in name and fnmatchcase(key, name)), None)


def instead_of(key: str) -> str | None:
    """What there is in place of a setting that a recipe has no key for, in a few words."""
    if said := said_of(key, SAID_OTHERWISE) or said_of(key, NOT_THERE):
        return said
    said = said_of(key, NOT_NEEDED)
    return said and f"leave it out: {said}"


def is_known(key: str) -> bool:
    """Whether a key is one of another tool's."""
    return key in CALLED_HERE or instead_of(key) is not None
