"""Put adapters on a model, take them off again, merge them."""

from mmfast.adapt.lora import (
    add_lora,
    has_lora,
    lora_parameters,
    merge_lora,
    merged_state_dict,
    remove_lora,
)

__all__ = ["add_lora", "has_lora", "lora_parameters", "merge_lora", "merged_state_dict", "remove_lora"]
