"""What statistics that do not come from the stored rows depend on."""

import json

import xxhash

from logra_kernels.store import GradientStore


def setting_of(store: GradientStore) -> str:
    """Hash of model, loss, layers and projection, whatever rows there are."""
    facts = [store.fingerprints, store.projection, list(store.layers.items()), store.meta]
    return xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode()).hexdigest()
