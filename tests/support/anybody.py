"""Small modules as other people write them: lists of blocks and all sorts of glue between them."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn


class Block(nn.Module):
    """A residual MLP, perhaps with a conditioning."""

    def __init__(self, width=16, cond=0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if cond:
            self.mod = nn.Linear(cond, width)

    def __call__(self, x, c=None):
        y = x if c is None else x * (1 + self.mod(c)[:, None])
        return x + self.fc2(nn.gelu(self.fc1(y)))


class Plain(nn.Module):
    """Embedder, blocks, norm, projection."""

    def __init__(self, depth=3, width=16, inputs=6):
        super().__init__()
        self.embed, self.blocks = nn.Linear(inputs, width), [Block(width) for _ in range(depth)]
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, inputs)

    def __call__(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.out(self.norm(h))


class Conditioned(nn.Module):
    """Two lists with a concatenation between, one modulation for all single blocks, time by keyword."""

    def __init__(self, width=16):
        super().__init__()
        self.image_in, self.text_in, self.time_in = nn.Linear(6, width), nn.Linear(5, width), nn.Linear(8, width)
        self.double, self.single = [Double(width) for _ in range(2)], [Block(width, width) for _ in range(2)]
        self.single_mod, self.out = nn.Linear(width, width), nn.Linear(width, 6)

    def __call__(self, image, text, *, t):
        c = self.time_in(mx.cos(t[:, None] * mx.arange(8)))
        shared = self.single_mod(nn.silu(c))
        x, y = self.image_in(image), self.text_in(text)
        for block in self.double:
            x, y = block(x, y, c)
        h = mx.concatenate([y, x], axis=1)
        for block in self.single:
            h = block(h, c=shared)
        return {"velocity": self.out(h[:, y.shape[1] :] * (1 + shared[:, None]))}


class Double(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.x, self.y = Block(width, width), Block(width, width)

    def __call__(self, x, y, c):
        x, y = self.x(x, c), self.y(y, c)
        return x + y.mean(1, keepdims=True), y


class Skips(nn.Module):
    """A UNet of tokens: lists of lists, classes of several kinds, skips that wait for the other half."""

    def __init__(self, width=16):
        super().__init__()
        self.embed, self.time_in = nn.Linear(6, width), nn.Linear(8, width)
        self.down = [[Block(width, width), Block(width)] for _ in range(2)]
        self.middle = Block(width)
        self.up = [Narrow(width) for _ in range(2)]
        self.out = nn.Linear(width, 6)

    def __call__(self, x, t):
        c, h, skips = self.time_in(mx.cos(t[:, None] * mx.arange(8))), self.embed(x), []
        for parts in self.down:
            for part in parts:
                h = part(h, c) if "mod" in part else part(h)
            skips.append(h)
        h = self.middle(h)
        for part in self.up:
            h = part(mx.concatenate([h, skips.pop()], axis=-1)) if isinstance(part, Narrow) else None
        return self.out(h)


class Narrow(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.narrow, self.fc = nn.Linear(2 * width, width), nn.Linear(width, width)

    def __call__(self, x):
        return self.fc(nn.silu(self.narrow(x)))


class EncoderDecoder(nn.Module):
    """What the encoder writes is read by every block of the decoder."""

    def __init__(self, width=16):
        super().__init__()
        self.encoder, self.decoder = [Block(width) for _ in range(2)], [Reader(width) for _ in range(2)]
        self.source, self.target, self.out = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 6)

    def __call__(self, source, target):
        memory, h = self.source(source), self.target(target)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            h = block(h, memory)
        return self.out(h)


class Reader(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q, self.to_kv, self.to_out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )

    def __call__(self, h, memory):
        k, v = mx.split(self.to_kv(memory), 2, axis=-1)
        return h + self.to_out(mx.softmax(self.to_q(h) @ k.transpose(0, 2, 1) / 4, axis=-1) @ v)


class WritesInto(nn.Module):
    """``x += y`` between blocks: the object stays, what is in it does not."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = [Block(width) for _ in range(3)]

    def __call__(self, x):
        first = x * 1.5
        h = first
        for block in self.blocks:
            h = block(h)
            h += 0.5 * first
        return h


class Only(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.only = nn.Linear(inputs, outputs)

    def __call__(self, x):
        return self.only(x)


class Ends(nn.Module):
    """What embeds and what projects stand in the list of blocks."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = [Only(6, width), Block(width), Block(width), Only(width, 6)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Louder(Block):
    """Calls what it is derived from."""

    def __call__(self, x, c=None):
        return 1.5 * super().__call__(x, c)


class PassesOn(nn.Module):
    """Blocks of a class and of one derived from it; what they pass on unchanged is read at the end, and the module
    returns what the last one wrote as well.
    """

    def __init__(self, width=16):
        super().__init__()
        self.embed, self.blocks = nn.Linear(6, width), [Both(width), Both(width, Louder)]
        self.out = nn.Linear(width, 6)

    def __call__(self, x):
        h, beside = self.embed(x), 2 * self.embed(x)
        for block in self.blocks:
            h, beside = block(h, beside)
        return self.out(h + beside), h


class Both(nn.Module):
    def __init__(self, width, kind=Block):
        super().__init__()
        self.inner = kind(width)

    def __call__(self, h, beside):
        return self.inner(h), beside


class Compiled(nn.Module):
    """Calls its network from a compiled function, as hosts do."""

    def __init__(self):
        super().__init__()
        self.net = Plain()
        self._predict = mx.compile(partial(self._run))

    def _run(self, x):
        return self.net(x)

    def __call__(self, x):
        return self._predict(x)


class Twice(nn.Module):
    """The same block at two places: a module that shares weights."""

    def __init__(self, width=16):
        super().__init__()
        block = Block(width)
        self.blocks = [block, Block(width), block]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Tied(nn.Module):
    """One layer that two parents hold."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = [Block(width), Block(width)]
        self.blocks[1].fc1 = self.blocks[0].fc1

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Remembers(nn.Module):
    """Adds to a cache that it is given."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = [Block(width), Block(width)]

    def __call__(self, x, cache):
        for block in self.blocks:
            x = block(x)
        cache.keys = x
        return x


class Cache:
    def __init__(self):
        self.keys = mx.zeros((1,))


class Random(nn.Module):
    """Draws random numbers."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = [Block(width), Block(width)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x + 0.1 * mx.random.normal(x.shape))
        return x


class Chooses(nn.Module):
    """Runs other blocks for other inputs."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = [Block(width) for _ in range(3)]

    def __call__(self, x, skip=False):
        for block in self.blocks[1:] if skip else self.blocks:
            x = block(x)
        return x


class WritesIntoItsInput(nn.Module):
    """Adds to what it was called with, in place, an array of MLX or of NumPy."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = [Block(width) for _ in range(2)]

    def __call__(self, x, noise):
        x += 1
        noise += 1
        x = x + mx.array(noise)
        for block in self.blocks:
            x = block(x)
        return x


class Guided(nn.Module):
    """Embeds a strength of guidance only where one is given, and computes what nobody reads."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = [Block(width) for _ in range(2)]
        self.into, self.out, self.idle = (nn.Linear(width, width) for _ in range(3))
        self.guidance_in = nn.Linear(1, width)

    def __call__(self, x, guidance=None):
        self.idle(x)
        h = self.into(x)
        if guidance is not None:
            h = h + self.guidance_in(guidance)[:, None]
        for block in self.blocks:
            h = block(h)
        return self.out(h)


class Autoencoder(nn.Module):
    """Convolutions down and up, a list of blocks at the bottom."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)
        self.blocks = [ResBlock(8) for _ in range(2)]

    def __call__(self, x):
        h = self.down(x)
        for block in self.blocks:
            h = block(h)
        return self.up(nn.silu(h))


class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.conv, self.mix = (
            nn.GroupNorm(2, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Linear(width, width),
        )

    def __call__(self, x):
        return x + self.mix(self.conv(nn.silu(self.norm(x))))


def seeded(kind, *args):
    """A module whose weights a seed decides."""
    mx.random.seed(0)
    module = kind(*args)
    mx.eval(module.parameters())
    return module


def tokens(seed, rows=2, count=5, width=16):
    return mx.random.normal((rows, count, width), key=mx.random.key(seed))
