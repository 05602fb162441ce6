"""`m3-train` under FSDP on processes without a GPU, where accelerate reads the settings and then takes DDP."""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from m3_training.finetune import main


original = AcceleratorState.__init__


def sharded(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # the state is shared, and asked for again later
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = sharded
    sys.exit(main())
