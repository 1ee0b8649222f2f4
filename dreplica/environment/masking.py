"""Mask passwords, tokens and keys in arguments and environment variables, before they are recorded.

A value is masked for its name (`--api-key X`, `DB_PASSWORD=X`, `{"token": "X"}`) or for its form (`hf_...`, `ghp_...`,
`scheme://user:password@host`). Where a name has another meaning in machine learning (`--pad-token`, `--key_dim`), the
value is kept. In doubt it is masked: a recorded secret is worse than a missing value. A short option (`-p X`) says too
little about its value, which is masked for its form only.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

MASK = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ALWAYS = re.compile(
    "password|passwd|passphrase|passcode|secret|credential|apikey|accesskey|privatekey|signingkey|accountkey|sshkey"
    "|authkey|authtoken|accesstoken|apitoken|refreshtoken|sessiontoken|connectionstring|authorization"
)
"""Found in the joined words of a name whose value is always secret."""
_ALWAYS_WORDS = {"pwd", "pw", "cred", "creds", "jwt"}
_MAYBE_WORDS = {"auth", "oauth", "authentication", "cookie", "bearer"}
_MAYBE_LAST = {"key", "token", "pass", "signature", "sig", "sas"}
_HARMLESS_ENDINGS = re.compile(
    "file|path|dir|directory|folder|type|method|mode|name|host|port|url|uri|dims?|size|len|length|count|num|limit|index"
    "|idx|column|col|field|format|scope|provider|enabled|required|timeout|server|realm|version|policy|env|var|dropout"
    "|bias|heads?|ratio|prob|weight|layers?|norm"
)
_NO_CREDENTIAL_BEFORE = re.compile(
    # What a tokenizer calls a token.
    "pad|padding|eos|bos|unk|cls|sep|mask|class|image|img|video|audio|special|start|end|stop|prefix|suffix|per|register"
    "|distill|distillation|next|last|first|trigger|placeholder|initializer|instance|max|min|num|n|text|new|think"
    "|thinking|user|assistant|system|tool|space|newline|seq|sequence|target|source|context|query|boundary"
    # What a data set, table or dict calls a key.
    "|sort|group|primary|foreign|state|metric|monitor|label|input|output|column|cache|json|data|dataset|batch|loss|order"
    "|partition|caption|prompt|features?|src|tgt|config|tag|map|rng|prng|random|log|best|checkpoint|ckpt|model|answer"
    "|question|reward|score|weight|index|id|join|shard|time|split|lora|module|param|value"
    # What an algorithm calls a pass.
    "|forward|backward|one|two|single|multi"
)
_SERVICES = re.compile("hf|huggingface|wandb|github|gitlab|openai|anthropic|aws|azure|gcp|google|slack|comet|neptune")
_NO_SECRET_VALUE = re.compile(r"[-+]?\d{1,5}(\.\d*)?(e[-+]?\d+)?|true|false|none|null|yes|no|on|off|", re.IGNORECASE)

_OPTION = re.compile(r"(?P<name>[-+~/]*[A-Za-z_][\w.\-/@]*)=(?P<value>.*)", re.DOTALL)
_PAIR = re.compile(r"""(?<![\w.\-])(?P<quote>\\?["']?)(?P<name>[A-Za-z_][\w.\-]*)(?P=quote)\]?\s*[:=]\s*""")
_VALUE = re.compile(r"""\\"[^"\\]*\\"|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s,;&}\])"']+""")
_REST = re.compile(r"""[^"'\n]*""")
_URL_USER = re.compile(r"(?P<start>://)(?:[^\s/?#@:]*:(?!\d+[/?#])\S*|(?![a-z_\-]{1,16}@)[^\s/?#]*)@")
_BEARER = re.compile(r"\b(?P<start>bearer\s+)[\w\-.=+/~]{8,}", re.IGNORECASE)
_FORMS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*|hooks\.slack\.com/services/\S+"
    r"|discord(?:app)?\.com/api/webhooks/\S+|(?<![A-Za-z0-9])(?:"
    + "|".join(
        (
            r"hf_[A-Za-z0-9]{16,}",
            r"gh[pousr]_[A-Za-z0-9]{16,}",
            r"github_pat_\w{16,}",
            r"gl(?:pat|dt|rt|cbt)-[\w\-]{16,}",
            r"sk-(?=[\w\-]*\d)[\w\-]{16,}",
            r"[srp]k_(?:live|test)_\w{12,}",
            r"(?:AKIA|ASIA)[A-Z0-9]{12,}",
            r"xox[a-z]-[\w\-]{10,}",
            r"AIza[\w\-]{30,}",
            r"ya29\.[\w\-]{16,}",
            r"eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*",
            r"npm_[A-Za-z0-9]{30,}",
            r"pypi-[\w\-]{30,}",
            r"wandb_v\d+_\w{16,}",
            r"local-[0-9a-f]{40}",
            r"nvapi-[\w\-]{16,}",
            r"(?:r8|gsk|pat|dop_v1)_[A-Za-z0-9]{30,}",
            r"\d{8,10}:AA[\w\-]{33}",
            r"SG\.[\w\-]{16,}\.[\w\-]{16,}",
        )
    )
    + ")",
    re.DOTALL,
)
"""Tokens that their issuers made recognizable. Each issuer documents its prefix."""
_HEX_40 = re.compile(r"(?<![\w/\-.@])[0-9a-f]{40}(?![\w/\-.])")
"""An older key of Weights & Biases, and a commit of git."""
_OF_A_COMMIT = re.compile(
    r"(rev|revision|commit|sha1?|ref|hash|digest|checksum|checkpoint|version|tag|branch|git)\W*$", re.I
)

_PIECE = 4_000
"""Length of the pieces in which a long text is searched, which bounds the time."""


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Mask secrets in command-line arguments.

    Args:
        arguments: The arguments, as in `sys.argv`.

    Returns:
        The arguments with `***` instead of each secret.
    """
    masked: list[str] = []
    name, is_plural = "", False
    for argument in arguments:
        if name and not _is_option(argument):
            masked.append(_mask_value(name, argument))
            if not names_secret(name, argument) and _is_path_of_secret(argument):
                name, is_plural = argument, False  # --set model.api_token X
            else:
                name = name if is_plural else ""
            continue
        name = argument.lstrip("-+") if _is_name(argument) else ""
        is_plural = name.lower().endswith("s")
        masked.append(_mask_argument(argument))
    return masked


def mask_text(text: str, name: str = "") -> str:
    """Mask secrets in a text: JSON, URLs, `name=value`, headers, and tokens of a known form.

    Args:
        text: The text.
        name: The name of the option or variable that the text is the value of.
    """
    if text.lstrip()[:1] in ("{", "["):
        try:
            tree = json.loads(text)
            masked = _mask_tree(tree)
        except (ValueError, RecursionError):
            pass
        else:
            return text if masked == tree else json.dumps(masked)
    first, *others = [_mask_piece(text[at : at + _PIECE], name) for at in range(0, len(text), _PIECE)] or [""]
    if not others:
        return first
    # A secret that two pieces share is masked in neither, so the others are represented by their digest.
    digest = xxhash.xxh3_128_hexdigest("\0".join(others).encode("utf-8", "backslashreplace"))
    return f"{first}... (and {len(text) - _PIECE} more characters, digest {digest[:12]})"


def _mask_piece(text: str, name: str) -> str:
    text = _URL_USER.sub(rf"\g<start>{MASK}@", text)
    text = _BEARER.sub(rf"\g<start>{MASK}", text)
    text = "".join(_mask_pairs(text))
    text = _FORMS.sub(MASK, text)
    before = f"{name}="
    return _HEX_40.sub(
        lambda found: found[0] if _OF_A_COMMIT.search(before + text[: found.start()]) else MASK,
        text,
    )


def names_secret(name: str, value: str | None = None) -> bool:
    """Return True if a value with this name is a secret.

    Args:
        name: Name of an option, a key or an environment variable.
        value: The value. Numbers and truth values are no secrets where the name has other meanings, too.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or _HARMLESS_ENDINGS.fullmatch(words[-1]):
        return False
    if _ALWAYS.search("".join(words)) or not _ALWAYS_WORDS.isdisjoint(words):
        return True
    if value is not None and _NO_SECRET_VALUE.fullmatch(value.strip()):
        return False
    if not _MAYBE_WORDS.isdisjoint(words):
        return True
    before, last = (words[-2] if len(words) > 1 else ""), words[-1]
    if last in ("keys", "tokens"):
        return _SERVICES.fullmatch(before) is not None
    for ending in _MAYBE_LAST:
        if last == ending or (ending == "token" and last.endswith(ending)):
            return not _NO_CREDENTIAL_BEFORE.fullmatch(last.removesuffix(ending) or before)
    return False


def _is_option(argument: str) -> bool:
    """Return True if an argument is an option rather than the value of the one before."""
    return re.match(r"--[A-Za-z]|-[A-Za-z]$", argument) is not None


def _is_name(argument: str) -> bool:
    """Return True if the next argument is this one's value: `--lr 0.1`, or `optim.lr 0.1` without dashes."""
    if re.fullmatch(r"--?[A-Za-z][\w.\-/]*", argument):
        return True
    return re.fullmatch(r"\w[\w.]*", argument) is not None and names_secret(argument)


def _is_path_of_secret(argument: str) -> bool:
    """Return True for the value of an option that is itself the name of a secret, with several words."""
    return re.fullmatch(r"\w+[._]\w[\w.]*", argument) is not None and names_secret(argument)


def _mask_argument(argument: str) -> str:
    found = _OPTION.fullmatch(argument)
    if found is None:
        return mask_text(argument)
    return f"{found['name']}={_mask_value(found['name'], found['value'])}"


def _mask_value(name: str, value: str) -> str:
    if names_secret(name, value):
        return MASK
    user = re.fullmatch(r"([^:/\s]+):[^/\s].*", value, re.DOTALL)
    if user and re.search("(user|username|login)$", name, re.IGNORECASE):
        return f"{user[1]}:{MASK}"
    return mask_text(value, name)


def _mask_pairs(text: str) -> Iterator[str]:
    """Yield a text in parts, with the value of each secret `name: value` or `name=value` masked."""
    start = 0
    while found := _PAIR.search(text, start):
        end = found.end()
        is_header = "authorization" in found["name"].lower()
        value = (_REST if is_header else _VALUE).match(text, end)
        yield text[start:end]
        start = end
        if value and value[0] and names_secret(found["name"], value[0].strip("\"'\\")):
            quote = value[0][: 2 if value[0].startswith("\\") else 1] if value[0][0] in "\\\"'" else ""
            yield f"{quote}{MASK}{quote}"
            start = value.end()
    yield text[start:]


def _mask_tree(tree: Any) -> Any:
    """Mask secrets in parsed JSON."""
    if isinstance(tree, dict):
        return {
            key: MASK if value not in ("", None) and names_secret(key, str(value)) else _mask_tree(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_mask_tree(item) for item in tree]
    return mask_text(tree) if isinstance(tree, str) else tree
