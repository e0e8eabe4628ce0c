"""What a trained chain can become: a merged checkpoint, a plain LoRA, a model card, a place on the hub."""
