"""Secrets in arguments are masked, and settings of a training are not."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreplica.environment.masking import MASK, mask_arguments, mask_text, names_secret

SECRET = "abc123SECRETxyz"
HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("given", "masked"),
    [
        (f"--api-key {SECRET} --lr 1", "--api-key *** --lr 1"),
        (f"--token={SECRET}", "--token=***"),
        (f"--hf-token {SECRET}", "--hf-token ***"),
        (f"-token {SECRET}", "-token ***"),
        (f"--apiKey {SECRET}", "--apiKey ***"),
        (f"--key {SECRET}", "--key ***"),
        (f"--password 1234 --password -{SECRET} --lr 1", "--password *** --password *** --lr 1"),
        (f"--use-auth-token {SECRET}", "--use-auth-token ***"),
        (f"--api-keys {SECRET} {SECRET} --lr 1", "--api-keys *** *** --lr 1"),
        (f"+logger.wandb.api_key={SECRET}", "+logger.wandb.api_key=***"),
        (f"DB.PASSWORD {SECRET} SOLVER.LR 0.1", "DB.PASSWORD *** SOLVER.LR 0.1"),
        (f"HF_TOKEN={SECRET}", "HF_TOKEN=***"),
        (f"-e PGPASSWORD={SECRET}", "-e PGPASSWORD=***"),
        (f"--user bob:{SECRET}", "--user bob:***"),
        (f"--set secrets.wandb={SECRET}", "--set secrets.wandb=***"),
        (f"--kv lr=3,api_key={SECRET},x=1", "--kv lr=3,api_key=***,x=1"),
        (f"--db postgres://me:{SECRET}@host/x", "--db postgres://***@host/x"),
        (f"--db=postgres://me:a@{SECRET}@host/x", "--db=postgres://***@host/x"),
        (f"https://{SECRET}@github.com/x.git", "https://***@github.com/x.git"),
        (f"'https://host/x?lr=1&token={SECRET}&y=2'", "'https://host/x?lr=1&token=***&y=2'"),
        (f"'https://host/x?sig={SECRET}'", "'https://host/x?sig=***'"),
        (f"--header 'Authorization: Bearer {SECRET}'", "--header 'Authorization: ***'"),
        (f"--header 'Authorization: Basic {SECRET} x'", "--header 'Authorization: ***'"),
        (f"""--x '{{"api_key": "{SECRET}", "lr": 1}}'""", """--x '{"api_key": "***", "lr": 1}'"""),
        (f"""--x='{{"a": {{"auth": {{"b": "{SECRET}"}}}}}}'""", """--x='{"a": {"auth": "***"}}'"""),
        (f"""--x '["HF_TOKEN={SECRET}"]'""", """--x '["HF_TOKEN=***"]'"""),
        (f"--x '{{api_key: {SECRET}, lr: 1}}'", "--x '{api_key: ***, lr: 1}'"),
        (f"""--x "{{'password': '{SECRET}'}}" """, """--x "{'password': '***'}" """),
        (f"""--x "os.environ['HF_TOKEN'] = '{SECRET}'" """, """--x "os.environ['HF_TOKEN'] = '***'" """),
        (f"--wandb {HEX}", "--wandb ***"),
        ("--x hf_abcdefghijklmnop1234", "--x ***"),
        ("--x=ghp_abcdefghijklmnopqrst1234", "--x=***"),
        ("--x a/sk-proj-abcdef1234567890abcd/b", "--x a/***/b"),
        ("--x AKIAIOSFODNN7EXAMPLE", "--x ***"),
        ("--x eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJ", "--x ***"),
        ("--x https://hooks.slack.com/services/T0/B0/abc", "--x https://***"),
        (f"--x https://discord.com/api/webhooks/12/{SECRET}", "--x https://***"),
        (f"--x 123456789:AA{'x' * 33}", "--x ***"),
        (f"--set model.api_token {SECRET} --lr 1", "--set model.api_token *** --lr 1"),
        (f"--opts wandb_api_key {SECRET} lr 1", "--opts wandb_api_key *** lr 1"),
        ("'-----BEGIN RSA PRIVATE KEY-----\nabc'", "'***'"),
    ],
)
def test_secret_is_masked(given: str, masked: str) -> None:
    assert mask_arguments(shlex.split(given)) == shlex.split(masked)


@pytest.mark.parametrize(
    "given",
    [
        *("train.py --lr 0.1 --seed 3", "--tokenizer gpt2", "--key_dim 64", "--num_tokens 100", "--max-tokens 5"),
        *("--pad-token '<pad>'", "--eos_token=x", "--cls-token '[CLS]'", "--tokens_per_batch 4096", "--author me"),
        *("--token-file /x", "--secret-name a", "--auth-type basic", "--sort-key date", "--image-key jpg"),
        *("--key 64", "--keys 4", "--auth false", "--two-pass true", "--pass 3", "-p 8080", "--monkey x"),
        *(f"--revision {HEX}", f"--model a/b@{HEX}", f"--ckpt runs/{HEX}/x", "--keyboard y", "--bypass x"),
        *("--url http://host:8080/a@b", "ssh://git@github.com/x", "tcp://localhost:29500", "--data s3://bucket/x"),
        *("""--x '{"lr": 1, "tokens": 5}'""", "--x sk-learn-random-forest-model", "optim.lr=0.1", "--amp -v"),
        *("--attention.key.bias true", "--token_dropout 0.1", "--no-password --lr 1", "--query-key-norm true"),
    ],
)
def test_setting_is_kept(given: str) -> None:
    assert mask_arguments(shlex.split(given)) == shlex.split(given)


def test_deep_or_long_text_is_no_error() -> None:
    assert mask_text("[" * 100_000).startswith("[[[")
    long = mask_text("x y=" * 25_000)
    assert long.startswith("x y=" * 1000 + "... (and 96000 more characters, digest ")
    assert len(long) < 4_100
    assert long != mask_text("x y=" * 24_999 + "x z=")


def test_secret_of_two_pieces_is_not_shown() -> None:
    masked = mask_text(f"-----BEGIN RSA PRIVATE KEY-----{SECRET * 500}")
    assert masked.startswith("***... (and ")
    assert SECRET not in masked
    assert mask_text("{") == "{"


@pytest.mark.parametrize(
    ("name", "value", "is_secret"),
    [
        ("password", "1", True),
        ("token", "1", False),
        ("token", "x", True),
        ("token", None, True),
        ("", None, False),
        ("--", None, False),
        ("HFToken", None, True),
    ],
)
def test_names_secret_weighs_the_value(name: str, value: str | None, is_secret: bool) -> None:
    assert names_secret(name, value) == is_secret


_NAMES = st.sampled_from(["password", "db-password", "api_key", "apiKey", "HF_TOKEN", "clientSecret", "my.credential"])
_SECRETS = st.text(st.characters(categories=["Lu", "Ll", "Nd"], max_codepoint=127), min_size=8, max_size=30).filter(
    lambda text: not text.isdigit()
)
_FORMS = st.sampled_from(
    [
        *("--{name}={secret}", "--{name} {secret}", "{name}={secret}", "--x={name}={secret}", "--x {name}:{secret}"),
        *('--x {{"{name}":"{secret}"}}', '--x {{"a":[{{"{name}":["{secret}"]}}]}}', "--x {{{name}:{secret},lr:1}}"),
        *("--x=https://host/?a=1&{name}={secret}", "--x=https://me:{secret}@host/{name}", "--x lr=1,{name}='{secret}'"),
    ]
)


@given(name=_NAMES, secret=_SECRETS, form=_FORMS)
def test_named_secret_never_appears(name: str, secret: str, form: str) -> None:
    arguments = form.format(name=name, secret=secret).split(" ")
    text = " ".join(mask_arguments(arguments))
    assert secret not in text or secret in form + name
    assert MASK in text


@given(st.lists(st.text(max_size=60), max_size=6))
def test_any_arguments_are_masked_without_error(arguments: list[str]) -> None:
    masked = mask_arguments(arguments)
    assert len(masked) == len(arguments)
    assert all(isinstance(item, str) for item in masked)
