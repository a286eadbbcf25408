"""What trainings on a cluster are made of in tests."""

from tasks.specs import LoraSpec

LORA_ONLY = LoraSpec(target_modules=("q_proj",))
