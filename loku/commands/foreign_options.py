"""Names of options that users of other trainers type, and the names of the same options here.

They come from TRL, peft, open-unlearning, TOFU's scripts and lm-evaluation-harness. No such name is taken for
ours: a wrong guess would change a run without a word.
"""

OPTIONS: dict[str, tuple[str, ...]] = {
    "adapter": ("adapter_name_or_path", "adapter_path", "lora_path", "peft", "peft_model"),
    "batch_size": ("eval_batch_size",),
    "beta": ("dpo_beta", "npo_beta"),
    "bf16": ("mixed_precision",),
    "data": ("dataset", "dataset_name", "dataset_path", "eval_data", "tasks"),
    "forget": (
        *("dataset", "dataset_name", "dataset_path", "forget_data", "forget_file", "forget_path"),
        *("forget_set", "forget_split", "split", "train_file"),
    ),
    "forget_weight": ("forget_coeff", "gamma", "npo_coeff"),
    "fisher_samples": ("num_fisher_samples",),
    "gradient_accumulation_steps": ("accumulation_steps", "grad_accum", "gradient_accumulation"),
    "init": ("init_lora_weights", "lora_init"),
    "learning_rate": ("lr", "peak_lr"),
    "lora_alpha": ("alpha",),
    "lora_rank": ("lora_r", "r", "rank"),
    "lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "max_length": ("max_len", "max_seq_len", "max_seq_length", "model_max_length", "seq_len"),
    "max_steps": ("num_steps", "steps", "train_steps"),
    "method": ("algorithm", "forget_loss", "loss", "loss_type", "trainer"),
    "method_args": (
        *("beta1", "beta2", "delta", "dual_step_size", "dual_warmup_epochs", "ignore_first_n_answer_tokens"),
        *("layer_id", "module_regex", "retain_loss_eps", "steering_coeff"),
    ),
    "model": ("base_model", "model_id", "model_name", "model_name_or_path", "model_path", "pretrained"),
    "model_init_kwargs": ("attn_implementation", "dtype", "load_in_4bit", "load_in_8bit", "torch_dtype"),
    "num_train_epochs": ("epoch", "epochs", "num_epochs"),
    "output": ("out", "output_dir", "output_path", "save_dir", "save_path"),
    "per_device_train_batch_size": ("batch_size", "bs", "micro_batch_size", "train_batch_size"),
    "resume_from_checkpoint": ("resume",),
    "retain": (
        *("dataset", "dataset_name", "dataset_path"),
        *("retain_data", "retain_file", "retain_path", "retain_set", "retain_split"),
    ),
    "retain_weight": ("alpha", "grad_diff_coeff", "kl_coeff", "retain_coeff"),
    "seed": ("random_seed",),
    "target_modules": ("lora_target_modules", "lora_targets"),
    "tokenizer": ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path"),
    "tuning": ("use_lora", "use_peft"),
    "use_cpu": ("cpu", "device", "no_cuda"),
    "warmup_steps": ("num_warmup_steps", "warmup", "warmup_ratio"),
}


def own_names(name: str) -> list[str]:
    """Return our names of an option of another trainer.

    Args:
        name: The name, without leading dashes, with - or _.
    """
    name = name.replace("-", "_").lower()
    return [own for own, others in OPTIONS.items() if name in others]
