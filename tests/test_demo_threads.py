"""What threads of m3-demo's page share: here another one comes at the very moment at which it could do harm."""

import threading
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from PIL import Image

from m3_serving.demo import rendering
from m3_serving.demo.asking import Answer, Compared, Cost, Message, Person, Picture, Settings
from m3_serving.demo.chats import Chat, chat_of
from m3_serving.demo.local_model import LocalModel
from m3_serving.demo.people import People
from m3_serving.demo.recent import Recent


LONG = Settings(max_new_tokens=50)


class Meanwhile:
    """Does something in another thread whenever it is called, so far as that is let: what waits for a lock goes on later."""

    def __init__(self, action, times=1):
        self.action, self.left, self.threads, self.errors = action, times, [], []

    def __call__(self):
        if not self.left:
            return
        self.left -= 1
        thread = threading.Thread(target=self._act)
        self.threads.append(thread)
        thread.start()
        thread.join(0.2)

    def _act(self):
        try:
            self.action()
        except Exception as error:
            self.errors.append(error)

    def check(self):
        assert self.threads
        for thread in self.threads:
            thread.join()
        assert not self.errors


class Watched(Person):
    """Someone of whom reading one attribute is the moment."""

    moment = ("", None)

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        watched, meanwhile = super().__getattribute__("moment")
        if name == watched:
            meanwhile()
        return value


@pytest.fixture(scope="module")
def model():
    """m3-tiny, whose answers never end by themselves."""
    made = LocalModel()
    made.load(lambda words, share: None)
    made.model.generation_config.eos_token_id = None
    return made


def picture(key, number=1):
    return Picture(Image.new("RGB", (40, 30), "red"), key, number, key)


def test_one_thread_at_a_time_uses_the_tokenizer(model, monkeypatch):
    tokenizer, inside, most = model.processor.tokenizer, [], []
    plain = tokenizer.set_truncation_and_padding
    meanwhile = Meanwhile(lambda: model.similarities(picture("clicked into"), 0))

    def noted(*args, **kwargs):
        inside.append(args)
        most.append(len(inside))
        meanwhile()
        plain(*args, **kwargs)
        inside.pop()

    monkeypatch.setattr(tokenizer, "set_truncation_and_padding", noted)
    answering = model.answer([Message("user", "What?", (picture("asked about"),))], LONG, Person())
    assert next(answering).cost.answer_tokens == 1
    answering.close()
    meanwhile.check()
    assert {*most} == {1} and len(most) > 2


def test_an_answer_that_is_closed_takes_nothing_from_the_cost_of_another(model):
    messages = [Message("user", "What?", (picture("the same"),))]

    def flops(meanwhile=lambda: None):
        hook = model.model.model.language_model.register_forward_pre_hook(lambda *_: meanwhile())
        answering = model.answer(messages, LONG, Person())
        found = next(answering).cost.prefill_flops
        hook.remove()
        answering.close()
        return found

    alone, other = flops(), model.answer(messages, LONG, Person())
    next(other)
    closing = Meanwhile(other.close)
    assert flops(closing) == alone
    closing.check()


def test_what_was_used_last_is_kept_whoever_uses_it():
    gone = []
    recent = Recent(2, gone.append)
    meanwhile = Meanwhile(lambda: [recent.put(key, key) for key in range(3)], times=2)

    class Values(type(recent._values)):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if key == "mine":
                meanwhile()

    recent._values = Values()
    recent.put("mine", "my value")
    meanwhile.check()
    assert [recent.get(key) for key in ("mine", 0, 1, 2)] == [None, None, 1, 2] and gone == ["my value", 0]


def test_what_is_kept_of_a_chat_is_in_the_hands_of_one_answer():
    person, taken = Watched(kept="a cache"), []
    person.moment = "kept", Meanwhile(lambda: taken.append(person.take()))
    taken.append(person.take())
    person.moment[1].check()
    assert sorted(map(str, taken)) == ["None", "a cache"]


def test_nothing_is_kept_of_who_leaves_at_that_moment():
    person = Watched()
    person.moment = "is_gone", Meanwhile(person.leave)
    person.keep("a cache")
    person.moment[1].check()
    assert person.kept is None and person.is_gone and not person.keep("another")


def test_two_first_messages_are_of_one_chat():
    person, chats = Watched(), []
    person.moment = "chat", Meanwhile(lambda: chats.append(chat_of(person)))
    chats.append(chat_of(person))
    person.moment[1].check()
    assert chats[0] is chats[1] is person.chat


def test_a_chat_answers_one_message_at_a_time_and_loses_no_picture():
    chat = Chat()
    assert [held.name for held in chat.add((picture("first"), "a file"))] == ["first"]
    with chat.turn():
        sent = chat.take()
        chat.add((picture("later"), "a file"))
        with pytest.raises(ValueError, match="An answer is under way"), chat.turn():
            raise AssertionError("two at once")
    with pytest.raises(KeyError), chat.turn():
        raise KeyError("the model's")
    with chat.turn():
        assert [held.name for held, _ in sent + chat.take()] == ["first", "later"]


def test_an_answer_that_was_stopped_stays_so():
    person = Person()
    person.begin()
    first = person.stop
    person.stop_all()
    person.begin()
    second = person.stop
    assert first.is_set() and not second.is_set()
    person.begin()
    person.stop_all()
    assert second.is_set() and person.stop.is_set(), "of two under way, both"


def test_files_go_while_others_come(tmp_path):
    people, request = People(tmp_path), SimpleNamespace(session_hash="one")
    file = people.new_file(request, "a.png")
    file.write_bytes(b"")
    meanwhile = Meanwhile(lambda: people.of(SimpleNamespace(session_hash="another"), "b.png"))

    class Files(dict):
        def values(self):
            for held in super().values():
                meanwhile()
                yield held

    people._files = Files(people._files, third={"c.png"})
    people.forget(request)
    meanwhile.check()
    assert not file.exists() and {*people._files} == {"third", "another"}


def test_one_thread_at_a_time_draws(monkeypatch):
    cost = Cost(1, 2, 3.0, 0.1, 0.2, 4)
    compared = Compared({1: Answer("a", cost, (1,), "stop"), 9: Answer("b", cost, (9,), "stop")})
    inside, most, plain = [], [], Figure.savefig
    meanwhile = Meanwhile(lambda: rendering.plot_svg(compared))

    def noted(*args, **kwargs):
        inside.append(args)
        most.append(len(inside))
        meanwhile()
        plain(*args, **kwargs)
        inside.pop()

    monkeypatch.setattr(Figure, "savefig", noted)
    assert rendering.plot_svg(compared).startswith("<svg")
    meanwhile.check()
    assert most == [1, 1]
