"""A judge over HTTP, asked for real: verdicts, and what is done where there is none."""

import socket
import time

import pytest
from local_judge import LocalJudge, serving

from jaxgpt.errors import UserError
from jaxgpt.evaluate.judge_server import ATTEMPTS, JudgeServer, Question

QUESTION = Question([{"role": "user", "content": "Say <b>hello</b>."}], "hi", "hello there", "hello")


def longer(asked: str, a: str, b: str) -> str:
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "C"


def asking(judge: LocalJudge, **settings) -> JudgeServer:
    return JudgeServer(judge.address, **({"model": "m", "pause": 0.01} | settings))


def test_verdicts_are_of_the_responses_in_the_order_they_are_shown():
    with serving(LocalJudge(longer)) as judge:
        server = asking(judge)
        assert server.verdict(QUESTION) == "second"
        assert server.verdict(QUESTION._replace(first="hello there", second="hi")) == "first"
        assert server.verdict(QUESTION._replace(first="ab", second="cd")) == "tie"
        assert server.verdict(QUESTION._replace(second="[[A]]")) == "second"  # of the reply the last verdict counts
    asked = judge.asked[0]
    assert asked["model"] == "m" and asked["temperature"] == 0 and asked["messages"][0]["role"] == "system"
    told = asked["messages"][1]["content"]
    assert "user: Say <b>hello</b>." in told and told.index("hi") < told.index("hello there")
    assert "<known to be right>\nhello\n" in told and judge.keys[0] is None


def test_what_is_not_known_is_not_shown():
    with serving(LocalJudge(longer)) as judge:
        asking(judge).verdict(QUESTION._replace(answer=None))
    assert "known to be right" not in judge.asked[0]["messages"][1]["content"]


@pytest.mark.parametrize("reply", ["I cannot decide.", "", "[[D]]", "A"])
def test_a_reply_without_a_verdict_is_unreadable(reply):
    with serving(LocalJudge(lambda *asked: reply + " ")) as judge:
        assert asking(judge).verdict(QUESTION) == "unreadable"


def test_many_questions_keep_their_order_and_no_more_are_under_way_than_is_allowed():
    def slow(asked: str, a: str, b: str) -> str:
        time.sleep(0.02)
        return longer(asked, a, b)

    with serving(LocalJudge(slow)) as judge:
        questions = [QUESTION._replace(first="x" * (n % 3), second="y") for n in range(24)]
        found = list(asking(judge, parallel=3).verdicts(questions))
    assert found == ["second", "tie", "first"] * 8
    assert 1 < judge.most <= 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    with serving(LocalJudge(longer)) as judge:
        judge.first = [(status, {"error": "busy"}, {})] * 2
        assert asking(judge).verdict(QUESTION) == "second"
    assert len(judge.asked) == 3


def test_a_server_that_asks_for_time_is_given_it():
    with serving(LocalJudge(longer)) as judge:
        judge.first = [(429, b"", {"Retry-After": "1"})]
        began = time.monotonic()
        assert asking(judge).verdict(QUESTION) == "second"
        assert 1.0 <= time.monotonic() - began < 5.0


def test_a_server_that_stays_busy_is_given_up():
    with serving(LocalJudge()) as judge:
        judge.first = [(503, {"error": {"message": "out of\n memory"}}, {})] * 20
        with pytest.raises(UserError, match=rf"answered 503 .*out of.n memory.* after {ATTEMPTS} attempts"):
            asking(judge).verdict(QUESTION)
    assert len(judge.asked) == ATTEMPTS


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {"error": "who are you"}, {}), "401 Unauthorized .*who are you.* judge_key names the environment"),
        (
            (404, {"error": "the model m does not exist"}, {}),
            "404 .*the model m does not exist.* judge_model is a model",
        ),
        ((400, b"\xff\xfe", {}), "answered 400 Bad Request"),
        ((200, b"<html>hello</html>", {}), "answered what no chat completion is: <html>hello</html>"),
        ((200, {"choices": []}, {}), "no chat completion is"),
        ((200, {"choices": [{"message": {"content": None}}]}, {}), "no chat completion is"),
        ((200, b"", {}), "no chat completion is"),
    ],
)
def test_what_does_not_get_better_by_waiting_is_told_at_once(answer, said):
    with serving(LocalJudge()) as judge:
        judge.first = [answer]
        with pytest.raises(UserError, match=said):
            asking(judge).verdict(QUESTION)
    assert len(judge.asked) == 1


def test_a_key_is_sent_and_goes_to_no_other_address():
    with serving(LocalJudge()) as other, serving(LocalJudge()) as judge:
        asking(judge, key="s3cret").verdict(QUESTION)
        judge.first = [(302, b"", {"Location": f"{other.address}/chat/completions"})]
        with pytest.raises(
            UserError, match=r"answered 302 .* It points to http://127.0.0.1:.*: name that address"
        ) as told:
            asking(judge, key="s3cret").verdict(QUESTION)
    assert judge.keys[0] == "Bearer s3cret" and not other.asked and "s3cret" not in str(told.value)


def test_a_silent_server_is_left_after_the_time_it_has():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server = JudgeServer(address, "m", timeout=0.05, pause=0.001)
        with pytest.raises(UserError, match=r"no answer in 0.05 s; judge_timeout is how long to wait"):
            server.verdict(QUESTION)
        with pytest.raises(UserError, match=r"no answer in 0.05 s"):
            server.check()


def test_a_server_that_is_not_there_is_told_before_anything_else():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"judge: http://127.0.0.1:{port}/v1 cannot be used: .*refused"):
        JudgeServer(f"http://127.0.0.1:{port}/v1/").check()


def test_the_only_model_of_a_server_need_not_be_named():
    with serving(LocalJudge(longer)) as judge:
        server = asking(judge, model=None)
        server.check()
        assert server.model == "tiny-judge"
    with serving(LocalJudge(models=("a", "b"))) as judge:
        with pytest.raises(UserError, match=r"judge_model: must be set, .* it has a, b"):
            asking(judge, model=None).check()
        asking(judge, model="b").check()
    with (
        serving(LocalJudge(models=())) as judge,
        pytest.raises(UserError, match=r"judge_model: must be set, .*/v1/models lists none"),
    ):
        asking(judge, model=None).check()


def test_a_server_need_not_list_its_models():
    with serving(LocalJudge()) as judge:
        JudgeServer(judge.address.removesuffix("/v1") + "/v2", "m").check()  # 404, and it is there


def test_one_failure_ends_them_all():
    def fails(asked: str, a: str, b: str) -> str:
        time.sleep(0.01)
        return "C"

    with serving(LocalJudge(fails)) as judge:
        judge.first = [(400, {"error": "too long"}, {})]
        with pytest.raises(UserError, match="too long"):
            list(asking(judge, parallel=2).verdicts([QUESTION] * 200))
        time.sleep(0.1)
    assert len(judge.asked) < 20
