"""From queries, keys, values and a feature map to outputs."""

from performers.attention.backends import backends, use_backend
from performers.attention.exact_keys.listed_keys import KeyBuckets, ListedKeys
from performers.attention.functional import favor_attention, favor_attention_weights
from performers.attention.key_sums import favor_state, merge_states
from performers.attention.sdpa import scaled_dot_product_attention
from performers.attention.state import FavorState

__all__ = [
    "FavorState",
    "KeyBuckets",
    "ListedKeys",
    "backends",
    "favor_attention",
    "favor_attention_weights",
    "favor_state",
    "merge_states",
    "scaled_dot_product_attention",
    "use_backend",
]
