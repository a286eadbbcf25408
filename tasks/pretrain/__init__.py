"""Pretrain: a GptOssForCausalLM from its config, trained from scratch."""
