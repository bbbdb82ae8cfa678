"""One row spread over processes: exact sequence parallelism on ``torch.distributed``."""

from performers.distributed.batches import count_labels, shard
from performers.distributed.context import SequenceParallel, check_alike, sequence_parallel

__all__ = ["SequenceParallel", "check_alike", "count_labels", "sequence_parallel", "shard"]
