"""What can be done to a file: to the data that it holds, with its checksums made right afterwards, or to its bytes.

Every mutation is a function of a random generator alone, so a number names it. Those of data know the form: values of
JSON become other kinds of values, entries of a safetensors header or members of an npz say what is not so.
"""

import hashlib
import io
import json
import re
import zipfile

import numpy as np

from mlxquant.files.checked import KEY, NO_SHA256

DEEP, LONG = 20000, 10**6
ODD = (
    0, 1, -1, 2, 3, 7, 8, 16, 33, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30),
    10**4000, 0.5, -0.5, -0.0, 1e-320, 3.5e38, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), True, False,
    None, "", " ", "0", "1e5", "keep", "channel", "float64", "__class__", "é" * 50, "\x00", "\ud800", "\n\n",
    "x" * LONG, "/etc/passwd", "../../escaped", "..", ".", "a/../../b", "C:\\x", "~", [], {}, [[]], [None], {"": 0},
    [0] * 9, {"shape": [2**40, 2**40]}, list(range(1000)),
)  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "U8", "I8", "U32", "I32", "I64", "U64", "F64", "BOOL", "F8_E4M3", "nothing", "", "f32")


def pick(rng, values):
    """One of them, itself and not a NumPy copy of it."""
    return values[int(rng.integers(len(values)))]


def places(data, path=()):
    """The path of every value in plain data."""
    found = [path] if path else []
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        found += places(value, (*path, key))
    return found


def nested(kind):
    """Text of JSON that is nested very deeply; no such data can be held here."""
    return "[" * DEEP + "]" * DEEP if kind else '{"a":' * DEEP + "0" + "}" * DEEP


def change_json(data, rng):
    """Change one to three values in plain data, in place, and say what was done."""
    done = []
    for _ in range(int(rng.integers(1, 4))):
        found = places(data)
        if not found:
            return "nothing to change"
        # the short paths have the structure, the many long ones are mostly alike
        depth = int(rng.integers(1, 1 + max(map(len, found))))
        path = pick(rng, [place for place in found if len(place) <= depth])
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        done.append(f"{_change(parent, path[-1], data, found, rng)} {'.'.join(map(str, path))[:80]}")
    return "; ".join(done)


def _change(parent, key, data, found, rng):
    way = pick(rng, ("odd", "odd", "odd", "remove", "rename", "scale", "other", "grow", "type"))
    value = parent[key]
    if way == "remove":
        del parent[key]
    elif way == "rename" and isinstance(parent, dict):
        parent[str(pick(rng, ("", "..", "a.b.c", "../x", key + "0", "9" * 300, key.upper())))] = parent.pop(key)
    elif way == "scale" and isinstance(value, int | float):
        parent[key] = value * pick(rng, (-1, 2, 10, 1000, 2**20, 2**31, 0.5))
    elif way == "other":
        other = data
        for step in pick(rng, found):
            other = other[step] if not isinstance(other, list) or step < len(other) else 0
            if not isinstance(other, dict | list):
                break
        parent[key] = json.loads(json.dumps(other))
    elif way == "grow" and isinstance(value, list) and value:
        parent[key] = value * int(rng.integers(2, 5))
    elif way == "grow" and isinstance(value, dict):
        value[str(pick(rng, ("", "more", "0", "a.b", "../out")))] = pick(rng, ODD)
    elif way == "type":
        parent[key] = {"text": str, "list": lambda v: [v], "object": lambda v: {"value": v}}[
            pick(rng, ("text", "list", "object"))
        ](value)
    else:
        way, parent[key] = "odd", pick(rng, ODD)
    return way


def written(data):
    """JSON text of data, also where no standard has it."""
    return json.dumps(data, sort_keys=True, indent=1).encode()


def signed(data):
    """JSON as ``files.checked`` writes it, where it can be written so."""
    facts = {key: value for key, value in data.items() if key != "sha256"}
    try:
        text = json.dumps(facts, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        whole = json.dumps({**facts, "sha256": digest}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        return whole.encode()
    except (ValueError, RecursionError):
        return written(data)


def change_json_file(content, rng):
    if rng.random() < 0.03:
        return nested(rng.random() < 0.5).encode(), "nested"
    data = json.loads(content)
    what = change_json(data, rng)
    return (signed(data) if "sha256" in data and "kind" in data else written(data)), what


def split_tensors(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])


def joined(entries, data):
    """A safetensors file, with our own checksum in it where it is ours."""
    ours = entries.get("__metadata__")
    facts = None
    if isinstance(ours, dict) and isinstance(ours.get(KEY), str):
        try:
            facts = json.loads(ours[KEY])
        except (ValueError, RecursionError):
            facts = None
    if not isinstance(facts, dict) or "sha256" not in facts:
        return _with_header(entries, data)

    def whole(sha256):
        text = json.dumps({**facts, "sha256": sha256}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        return _with_header({**entries, "__metadata__": {KEY: text}}, data)

    try:
        return whole(hashlib.sha256(whole(NO_SHA256)).hexdigest())
    except (ValueError, RecursionError):
        return _with_header(entries, data)


def _with_header(entries, data):
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(data)


def change_tensors_file(content, rng):
    entries, data = split_tensors(content)
    names = [name for name in entries if name != "__metadata__"]
    ours = (entries.get("__metadata__") or {}).get(KEY)
    way = pick(rng, ("facts", "facts", "facts", "entry", "values", "values", "shape", "dtype", "drop", "rename"))
    if way == "facts" and ours is not None:
        facts = json.loads(ours)
        what = change_json(facts, rng)
        entries["__metadata__"][KEY] = json.dumps(facts, sort_keys=True)
    elif way in ("facts", "entry") or not names:
        what = "header: " + change_json(entries, rng)
    else:
        name = pick(rng, names)
        what = f"{way} of {name}"
        entry = entries[name]
        if way == "values":
            _change_values(data, entry, rng)
        elif way == "shape":
            entry["shape"] = pick(rng, ([], [1, *entry["shape"]], entry["shape"][::-1], [int(np.prod(entry["shape"]))],
                                        [*entry["shape"], 2], [2**31, *entry["shape"]], [-1], [0, 2**40]))  # fmt: skip
        elif way == "dtype":
            entry["dtype"] = pick(rng, DTYPES)
        elif way == "drop":
            del entries[name]
        else:
            entries[str(pick(rng, ("", "a.b", "weight", name + "2", "x" * 1000, "é\n")))] = entries.pop(name)
    return joined(entries, data), what


def _change_values(data, entry, rng):
    start, end = entry["data_offsets"]
    width = {"F32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"])
    odd = pick(rng, (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30, 1e-40))
    if width is None or end == start:
        data[start:end] = rng.bytes(end - start)
    else:
        values = np.frombuffer(bytes(data[start:end]), {4: np.float32, 2: np.float16}[width]).copy()
        with np.errstate(over="ignore"):
            values[rng.integers(len(values))] = odd
            if rng.random() < 0.3:
                values[:] = odd
        data[start:end] = values.tobytes()


def change_npz_file(content, rng):
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if not arrays:
        return content, "nothing to change"
    name = pick(rng, list(arrays))
    way = pick(rng, ("values", "dtype", "shape", "drop", "rename", "object", "packed", "claim", "more"))
    value = arrays[name]
    if way == "values" and value.size and value.dtype.kind in "fiu":
        flat = value.reshape(-1).copy()
        with np.errstate(all="ignore"):
            chosen = slice(None) if rng.random() < 0.3 else int(rng.integers(value.size))
            odd = pick(rng, (np.nan, np.inf, -1, 0, 100, 1e30))
            flat[chosen] = np.float64(odd).astype(value.dtype)
        arrays[name] = flat.reshape(value.shape)
    elif way == "dtype":
        with np.errstate(all="ignore"):
            arrays[name] = value.astype(pick(rng, ("<f8", "<i2", "<u1", "<c8", "?", "<U5", ">f4", "<f2")))
    elif way == "shape":
        arrays[name] = pick(
            rng, (value[None], value.reshape(-1), value.T, value[..., None], np.atleast_1d(value)[:0], np.array(1.0))
        )
    elif way == "drop":
        del arrays[name]
    elif way == "rename":
        arrays[str(pick(rng, ("x", "..", name + "2", "a__b__c")))] = arrays.pop(name)
    elif way == "object":
        arrays[name] = np.array([{"a": 1}], dtype=object)
    elif way == "more":
        arrays[name] = np.concatenate([value.reshape(-1)] * 2)
    out = io.BytesIO()
    (np.savez_compressed if way == "packed" else np.savez)(out, **arrays)
    content = out.getvalue()
    return (_claiming(content, rng) if way == "claim" else content), f"{way} of {name}"


def _claiming(content, rng):
    """A member whose header claims another shape than it has."""
    shape = pick(rng, ((10**12,), (2**40, 2**40), (-1,), (0, 10**30), (3,)))
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for place, member in enumerate(old.infolist()):
            if place:
                new.writestr(member, old.read(member))
                continue
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": shape})
            new.writestr(member.filename, head.getvalue() + bytes(2**16))
    return out.getvalue()


def change_bytes(content, rng):
    """Bytes of any file: some turned, cut off, put in or overwritten."""
    data = bytearray(content)
    way = pick(rng, ("flip", "flip", "cut", "insert", "zeros", "append", "empty", "swap"))
    place = int(rng.integers(len(data))) if data else 0
    if rng.random() < 0.5:  # headers are at the front
        place %= 400
    if way == "flip" and data:
        for _ in range(int(rng.integers(1, 5))):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif way == "cut":
        del data[place:]
    elif way == "insert":
        data[place:place] = rng.bytes(int(rng.integers(1, 40)))
    elif way == "zeros":
        data[place : place + 16] = bytes(16)
    elif way == "append":
        data += rng.bytes(int(rng.integers(1, 100)))
    elif way == "empty":
        data.clear()
    else:
        data[:8] = rng.bytes(8)
    return bytes(data), way


TEXTS = (
    "", "\t", "\n", "#", "0\t", "\tred", "-1\tred", "1.5\tred", "٣\tred", "²\tred", "9" * 30 + "\tred",
    "9" * 5000 + "\tred", "18446744073709551616\tred", "0 red", "1\t" + "red " * 10**5, "x" * 10**6, "\ufeff0\tred",
    "0\tred\r\n", "\x00", "0\t\x00", "0\ta\x85b", "0\t\u2028",
)  # fmt: skip


def change_text_file(content, rng):
    lines = content.decode().split("\n")
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(lines)))
        way = pick(rng, ("replace", "insert", "drop", "cut"))
        if way == "drop":
            lines[place] = ""
        elif way == "cut":
            lines[place] = lines[place][int(rng.integers(1 + len(lines[place]))) :]
        else:
            lines[place : place + (way == "replace")] = [pick(rng, TEXTS)]
    return "\n".join(lines).encode(), "lines"


PIECES = (
    "rtn", "gptq", "taqdit", "tcaqdm", "svdquant", "qronos", "+", "+rotation", "+smoothquant", "+softmax8",
    "+mixed3.5", "+mixed", "+svd", "+svd16", "+svd99999999999999999999", "+whitened", "+tiers", "+dynamic",
    "+learned", "+", "-", "w", "-w4", "-w4a8", "-w8a16", "-w9a8", "-w4a7", "a8", "-g32", "-g128", "-g0",
    "-g99999999999999999999", "-tensor", "-sym", "-asym", "-bf16", "-static", "-token", "=", "=keep", "=w8a16", "=w2a4",
    "@attention", "@", "@nothing", "*", "*.fc2", "[", "[!", "?", "**" * 30, ".", "..", ",", " ", "\n", "\t", "é", "²",
    "\x00", "9" * 400, "x" * 10**5, "mixed1e5", "+mixed0", "+mixed99999999999999999999999999999", "(", "\\",
    "*[" * 200, "+progressive", "+shift", "+damped", "+clipped",
)  # fmt: skip


def change_words(text, rng):
    """A text with pieces of recipes put in, taken out, and repeated."""
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(1 + len(text)))
        end = place + int(rng.integers(0, 4)) * int(rng.integers(2))
        text = text[:place] + pick(rng, PIECES) + text[end:]
    return text


def change_file(path, rng):
    """Change a file by its form, or, one time in four, by its bytes alone; say what was done."""
    content = path.read_bytes()
    by_form = {
        ".json": change_json_file,
        ".safetensors": change_tensors_file,
        ".npz": change_npz_file,
        ".txt": change_text_file,
    }
    change = by_form.get(path.suffix)
    raw = change is None or rng.random() < 0.25
    new, what = (change_bytes if raw else change)(content, rng)
    path.write_bytes(new)
    return f"{path.name}: {'bytes, ' if raw else ''}{what}"


def vouch(root, before):
    """Make the checksums right that files below ``root`` have of each other; ``before`` is path to digest, as it was.

    A file that names another by its digest changes with it, and so does what names that one.
    """
    old = dict(before)
    for _ in range(6):
        now = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in old if path.exists()}
        renamed = {old[path].encode(): digest.encode() for path, digest in now.items() if digest != old[path]}
        if not renamed:
            return
        pattern = re.compile(b"|".join(renamed))
        old = dict(now)
        for path in root.rglob("*.json"):
            content = path.read_bytes()
            new = pattern.sub(lambda match, names=renamed: names[match[0]], content)
            if new != content:
                try:
                    data = json.loads(new)
                    new = signed(data) if "kind" in data and "sha256" in data else new
                except (ValueError, RecursionError, TypeError):
                    pass
                path.write_bytes(new)


def digests(root):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}
