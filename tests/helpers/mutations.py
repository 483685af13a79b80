"""Files to test with that are wrong in any way: mutations of whole ones, as hypothesis draws them."""

import copy
import json

from hypothesis import strategies as st

# What code that reads JSON may not have thought of.
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**31,
    2**63,
    10**25,
    10**400,
    -(10**400),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "nan",
    "1e999",
    "-1",
    "10" * 20,
    "../../out",
    "/dev/zero",
    "~nobody9",
    "a\0b",
    "\ud800",
    "{}",
    "%s%n",
    "tests.helpers.payload.Boom",
    "tests.helpers.payload:Boom",
    [],
    [[]],
    [0],
    [1, 2, 3],
    ["uniform", 0, 1],
    ["uniform", -1e308, 1e308],
    ["log_uniform", 0, 10**400],
    {},
    {"a": 1},
    {"a.b": 1},
    {"": {}},
    {"__class__": "tests.helpers.payload.Boom"},
]
for _ in range(40):
    ODD.append([ODD[-1]] if len(ODD) % 2 else {"a": ODD[-1]})
del ODD[-39:-1]  # two that are nested: a little, and deep
_KEYS = ["", "a.b", "step", "sweep", "name", "__class__", "__dict__", "lock", "items", "\0", "\ud800"]

_values = st.sampled_from(ODD).map(copy.deepcopy) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(content, path=()):
    """The paths to every value in `content`."""
    yield path
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from places(value, (*path, key))


@st.composite
def changed(draw, content):
    """`content`, a value of JSON, with one to three of its values replaced, removed, renamed, or put elsewhere."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([place for place in places(content) if place] or [(None,)]))
        if last is None:
            return draw(_values)
        holder = content
        for key in path:
            holder = holder[key]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "copy", "add")))
        if kind == "replace":
            holder[last] = draw(_values)
        elif kind == "remove":
            del holder[last]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from([*_KEYS, *holder]))] = holder.pop(last)
        elif kind == "copy":
            source = content
            for key in draw(st.sampled_from(list(places(content)))):
                source = source[key]
            holder[last] = copy.deepcopy(source)
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(_KEYS))] = draw(_values)
        else:
            holder.append(draw(_values))
    return content


class Content(bytes):
    """The content of a file, which a failing example does not print whole."""

    def __repr__(self):
        return f"{self[:1000]!r}, {len(self)} bytes in all"


@st.composite
def damaged(draw, content):
    """`content`, bytes, with one to four pieces overwritten, removed, doubled or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 20)))
        kind = draw(st.sampled_from(("overwrite", "remove", "double", "cut")))
        if kind == "overwrite":
            content[start:stop] = draw(st.binary(max_size=4))
        elif kind == "remove":
            del content[start:stop]
        elif kind == "double":
            content[start:start] = content[start:stop] * draw(st.integers(1, 1000))
        else:
            del content[start:]
    return Content(content)


def json_files(content):
    """The bytes of a file that holds, or held, `content` as JSON."""
    whole = json.dumps(content)
    return changed(content).map(lambda value: json.dumps(value).encode()) | damaged(whole.encode())


def line_files(rows):
    """The bytes of a file that holds, or held, `rows`, one a line."""
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    lines = changed(rows).map(lambda rows: rows if isinstance(rows, list) else [rows])
    return lines.map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()) | damaged(whole.encode())
