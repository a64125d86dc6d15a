"""Adapters: from a folder that PEFT saved to updates of the base's tensors."""

from streammerge.adapters.config import LoraConfig
from streammerge.adapters.folder import AdapterFolder, find_adapter, open_adapter
from streammerge.adapters.heads import with_named_head
from streammerge.adapters.resolve import ResolvedAdapter, resolve_adapter

__all__ = [
    "AdapterFolder",
    "LoraConfig",
    "ResolvedAdapter",
    "find_adapter",
    "open_adapter",
    "resolve_adapter",
    "with_named_head",
]
