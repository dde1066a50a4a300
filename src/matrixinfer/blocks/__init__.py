"""Computes block hashes from token ids. The index identifies a prompt's blocks by these hashes.

A prompt is cut into blocks of `block_size` tokens; only full blocks count. There are two schemes:

`prefix` (default): like a KV block, a block's hash depends on everything before it::

    h[i] = u64(SHA-256(h[i-1] as 8 bytes big endian ‖ tokens as u32 big endian)[:8]) with the top bit cleared

Block 0 has no parent bytes. With a cache salt, block 0 has the parent `salt_parent(salt)`. If images, audio or video begin
in a block, its parent is `media_parent` of what it follows and of these.

`block`: each block is hashed separately, like block 0 above. Existing MatrixInfer and kthena writers use this scheme in
Redis. Equal blocks after different prefixes have the same hash, so matches are only hints; salted prompts never match.
"""

from matrixinfer.blocks.chain import BlockChain, SharedHashes
from matrixinfer.blocks.names import ROOT, Medium, TokenIds, media_in, media_parent, salt_parent, token_bytes
from matrixinfer.blocks.processor import Scheme, TokenBlockProcessor

__all__ = [
    "ROOT",
    "BlockChain",
    "Medium",
    "Scheme",
    "SharedHashes",
    "TokenBlockProcessor",
    "TokenIds",
    "media_in",
    "media_parent",
    "salt_parent",
    "token_bytes",
]
