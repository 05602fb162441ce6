"""`m3-train` under DeepSpeed on processes without a GPU, where accelerate reads the settings and then takes DDP."""

import sys

import deepspeed
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from m3_training.finetune import main


original = AcceleratorState.__init__


def sharded(self, *args, deepspeed_plugin=None, **kwargs):
    original(self, *args, deepspeed_plugin=deepspeed_plugin, **kwargs)
    plugins = deepspeed_plugin or self.__dict__.get(
        "deepspeed_plugins"
    )  # the state is shared, and asked for again later
    if plugins:
        plugins = plugins if isinstance(plugins, dict) else {"default": plugins}
        for plugin in plugins.values():
            object.__setattr__(plugin, "_selected", True)
        self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, plugins


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    AcceleratorState.__init__ = sharded
    sys.exit(main())
