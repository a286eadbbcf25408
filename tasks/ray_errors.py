"""What Ray's own errors mean for a training. A job's driver, which knows nothing of ours, has it in its plan.

    name of an error of Ray's -> one of our errors ("": a node is lost, which the job's exit status tells), what to say

By name, as not every Ray has each of them.

Ring: pure.
"""

_LOST_NODE = ("", "a node of the job is lost")
MEANINGS = {
    "ActorPlacementGroupRemoved": _LOST_NODE,
    "ActorUnschedulableError": _LOST_NODE,
    "LocalRayletDiedError": _LOST_NODE,
    "NodeDiedError": _LOST_NODE,
    "OutOfMemoryError": (  # by Ray's memory monitor
        "CapacityError",
        "a node ran out of memory, and Ray ended the job's part there: take nodes with more memory, more nodes with "
        "fsdp2, or fewer processes_per_node in TrainSpec.launch",
    ),
    "RayActorError": _LOST_NODE,
    "RuntimeEnvSetupError": ("TransientError", "Ray could not set up the job on a node"),
}
