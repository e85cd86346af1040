"""Words that the tasks make names of; the two splits share none."""

from retention_gates.data.tasks.base import Split

ADJECTIVES: dict[Split, tuple[str, ...]] = {
    "train": tuple("brave calm dark early famous gentle heavy little narrow old proud quiet red warm".split()),
    "test": tuple("bright cold deep empty green happy large lonely lost round silver small sweet wild".split()),
}
NOUNS: dict[Split, tuple[str, ...]] = {
    "train": tuple("bridge castle farmer forest horse island lamp mirror mountain river ship sword tower".split()),
    "test": tuple("apple barn door eagle garden hammer king lake letter market road stone valley".split()),
}
