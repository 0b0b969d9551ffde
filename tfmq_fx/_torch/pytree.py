"""torch's pytrees: nested tuples, lists, dictionaries and output classes. They have no public name yet."""

from torch.utils._pytree import (
    SERIALIZED_TYPE_TO_PYTHON_TYPE,
    SUPPORTED_SERIALIZED_TYPES,
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_structure,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

__all__ = [
    "TreeSpec",
    "serialized_node_types",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
    "treespec_dumps",
    "treespec_loads",
]


def serialized_node_types() -> dict[str, type]:
    """The pytree nodes of this process, by the name they are serialized under, whose context is plain JSON."""
    return {
        name: kind
        for name, kind in SERIALIZED_TYPE_TO_PYTHON_TYPE.items()
        if SUPPORTED_SERIALIZED_TYPES[kind].from_dumpable_context is None
    }
