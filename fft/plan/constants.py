"""The numbers that no datasheet has: what share of a rate is reached. Few, each with a meaning, the same for all runs.

Fitted on the published runs that :data:`fft.plan.studies.FITTED` names, together with the shares that devices reach
and the bandwidth inside nodes of A100 and 910B (``conf/hardware``), never on one run alone; docs/planner.md says how.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """``stream`` is the share of a memory's bandwidth that kernels reach; ``launch`` seconds that every kernel takes.

    ``tile`` is the number of rows, or columns, at which a product reaches half of the rate: one of n reaches
    n / (n + tile) of it. ``row`` is the same of an attention kernel, in tokens of a document. ``network`` is the share
    of the bandwidth between nodes that collectives reach, ``wire`` the same of sends from one to one. ``beside`` is the
    share of an exchange's time by which it slows the kernels that hide it: they give it processors and bandwidth.
    ``straggler`` is how much longer all wait for the slowest, per doubling of nodes. ``host`` is what eager Python
    takes to launch the kernels of a layer's forward, in seconds. ``chain`` is by how much faster operators move
    activations than the memory's bandwidth says: 1, but where they stay in a cache, or where operators compute slowly.
    ``summing`` is by how much faster bytes are in an all-reduce than in a gather.
    """

    stream: float = 0.77
    launch: float = 6.2e-6
    tile: float = 108.0
    row: float = 580.0
    network: float = 0.74
    wire: float = 0.58
    beside: float = 0.49
    straggler: float = 0.0056
    host: float = 4e-4
    chain: float = 1.0
    summing: float = 1.0


FITTED_CONSTANTS = Constants()
