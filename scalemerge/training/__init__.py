"""Training of experts and joint baselines."""

from scalemerge.training.job import Job, expert_job, joint_job
from scalemerge.training.loop import load_encoder, train

__all__ = ["Job", "expert_job", "joint_job", "load_encoder", "train"]
