import sys

from course_lib.ranks import cpu  # CPU
from course_lib.stack import devices  # CPU

cpu.activate()  # CPU

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

cfg = ConfigContainer.from_yaml(sys.argv[1])
devices.apply(cfg, "cpu")  # CPU
pretrain(cfg, forward_step)
