"""What a browser shows of a run's report. Needs the extra `browser` and a Chromium."""

import contextlib
import json
import subprocess
import sys

import pytest
from view_run import EVIL, write_run

from gtpo_jax import view
from gtpo_jax.errors import InputError

pytest.importorskip("playwright.sync_api", reason="no Playwright: the extra `browser`")


@pytest.fixture(scope="module")
def chromium():
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(view.browser())
        except InputError as error:
            pytest.skip(str(error))
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Three problems, each with a right, two wrong, a truncated and a failed trajectory."""
    run = write_run(tmp_path_factory.mktemp("view") / "run", problems=3)
    (run / "config.json").write_text(json.dumps({"reward": {"alpha": 0.5}}))
    path = run / "report.html"
    path.write_text(view.report(run), encoding="utf-8")
    return path


@pytest.fixture
def page(chromium, file):
    """The report, opened from disk; fails on any error, message or request of the page."""
    context = chromium.new_context(
        viewport={"width": 1440, "height": 1000}, color_scheme="light", offline=True
    )
    tab = context.new_page()
    seen = []
    tab.on("console", lambda message: seen.append(message.text))
    tab.on("pageerror", lambda error: seen.append(str(error)))
    tab.on("dialog", lambda dialog: seen.append(dialog.message))
    tab.on("request", lambda request: seen.append(request.url))
    tab.goto(file.as_uri())
    yield tab
    assert seen == [file.as_uri()]
    context.close()


def texts(page, selector):
    return page.locator(selector).all_text_contents()


def test_it_opens_from_disk(page):
    assert page.title() == "run: report of a run"
    assert texts(page, "#curves h3") == ["Accuracy"]
    assert page.locator("#curves svg path.smooth").count() == 2
    assert page.locator("#slider").get_attribute("max") == "2"
    assert texts(page, "#step b") == ["step 0"]
    assert page.locator("#problems button").count() == 3
    assert page.locator("article").count() == 5


def test_what_a_model_wrote_is_shown_and_never_run(page):
    for _ in range(3):
        page.keyboard.press("j")
    assert page.evaluate("window.evil") is None
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0
    for selector in ("#title", "#prompt", "#answer", "#problems span", ".feedback pre"):
        assert any(EVIL in text for text in texts(page, selector)), selector
    for selector in (".policy > pre", ".policy > p", ".said b", ".said span"):
        assert any(EVIL in text for text in texts(page, selector)), selector


def test_a_script_that_got_in_after_all_would_not_run(chromium, file):
    tab = chromium.new_page()
    tab.goto(file.as_uri())
    tab.evaluate("document.body.append(make('script', {}, 'window.evil = 1'))")
    assert tab.evaluate("window.evil") is None
    tab.close()


@pytest.mark.parametrize(
    ("name", "columns", "problems", "verdict"),
    [
        ("all", 5, 3, None),
        ("right", 1, 3, "✓ right"),
        ("wrong", 2, 3, "✗ wrong"),
        ("infra", 1, 3, "! infra"),
        ("truncated", 1, 3, "… truncated"),
        ("highest", 1, 3, "✓ right"),
        ("lowest", 1, 3, "✗ wrong"),
    ],
)
def test_filters_show_their_trajectories(page, name, columns, problems, verdict):
    page.click(f"[data-filter={name}]")
    assert page.get_attribute(f"[data-filter={name}]", "aria-pressed") == "true"
    assert page.locator("[aria-pressed=true]").count() == 1
    assert page.locator("article").count() == columns
    assert page.locator("#problems button").count() == problems
    if verdict:
        assert set(texts(page, ".verdict")) == {verdict}
        # The count beside the name is of the whole step.
        assert texts(page, f"[data-filter={name}] small") == [str(3 * columns)]


def test_the_most_extreme_turns_are_outlined_and_come_first(page):
    page.keyboard.press("j")
    page.click("[data-filter=lowest]")
    page.keyboard.press("k")
    page.keyboard.press("k")
    assert "problem 0" in page.text_content("#title")
    assert texts(page, ".turn.peak b.advantage") == ["−2.00", "−0.50"]
    assert texts(page, "#low") == ["−2.00"] and texts(page, "#high") == ["+2.00"]


def test_the_slider_and_the_arrows_go_through_the_steps(page):
    page.keyboard.press("ArrowRight")
    assert texts(page, "#step b") == ["step 2"] and page.input_value("#slider") == "1"
    page.focus("#slider")
    page.keyboard.press("ArrowRight")  # once, though the slider would move by itself as well
    assert texts(page, "#step b") == ["step 4"] and page.is_disabled("#after")
    page.keyboard.press("ArrowRight")
    assert texts(page, "#step b") == ["step 4"]
    page.fill("#slider", "0")
    assert texts(page, "#step b") == ["step 0"] and page.is_disabled("#before")
    page.click("#after")
    assert texts(page, "#step small") == ["2 of 3 recorded"]
    page.keyboard.press("ArrowLeft")
    assert texts(page, "#step b") == ["step 0"]


def test_keys_go_through_problems_and_filters(page):
    def current():
        return page.locator("#problems [aria-current=true]").get_attribute("title")[:9]

    seen = [current()]
    for key in ("j", "ArrowDown", "j", "k", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
        seen.append(current())
        assert current() in page.text_content("#title")
    assert seen == [f"problem {i}" for i in (0, 1, 2, 2, 1, 0, 0)]
    filters = []
    for key in ["f"] * 7 + ["F"]:
        page.keyboard.press(key)
        filters.append(page.get_attribute("[aria-pressed=true]", "data-filter"))
    names = ["right", "wrong", "infra", "truncated", "highest", "lowest", "all", "lowest"]
    assert filters == names


def test_a_question_mark_opens_the_help(page):
    page.keyboard.press("?")
    assert page.is_visible("#help") and "next filter" in page.text_content("#help")
    page.keyboard.press("ArrowRight")  # means nothing while the help is open
    page.keyboard.press("Escape")
    assert not page.is_visible("#help") and texts(page, "#step b") == ["step 0"]
    page.click("#keys")
    page.click("#help button")
    assert not page.is_visible("#help")


def background(page, selector="body"):
    return page.locator(selector).first.evaluate("e => getComputedStyle(e).backgroundColor")


def test_light_and_dark(page, chromium, file):
    light = background(page)
    page.keyboard.press("t")
    dark = background(page)
    assert light != dark and page.text_content("#theme") == "Light"
    page.click("#theme")
    assert background(page) == light
    tab = chromium.new_page(color_scheme="dark")
    tab.goto(file.as_uri())
    assert background(tab) == dark and tab.text_content("#theme") == "Light"
    tab.keyboard.press("t")
    assert background(tab) == light
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_advantages_are_colours_and_what_has_no_loss_is_grey(page, scheme):
    page.emulate_media(color_scheme=scheme)
    more, less = "article:nth-child(1) .turn", "article:nth-child(2) .turn"
    assert texts(page, f"{more} b.advantage") == ["+0.50", "+1.50"]
    assert texts(page, f"{less} b.advantage") == ["−2.00", "−0.50"]
    colours = [background(page, f"{more} >> nth={i} >> .policy") for i in (0, 1)]
    colours += [background(page, f"{less} >> nth={i} >> .policy") for i in (0, 1)]
    assert len(set(colours)) == 4
    # A trajectory that failed by our fault is in no loss: no colour, and it says so.
    failed = page.locator("article").nth(4)
    assert failed.get_attribute("class") == "out"
    assert "not in the loss" in failed.text_content()
    assert page.locator("article.out .turn.more, article.out .turn.less").count() == 0
    assert page.locator("#prompt.masked").count() == 1
    assert page.locator(".feedback").count() == page.locator(".feedback.masked").count() > 0


def test_the_matrix_and_the_map(page):
    rows = [row.locator("td").all_text_contents() for row in page.locator("#matrix tr").all()]
    assert rows[1:3] == [["1", ".58", "·", "·", "1"], [".58", "1", "·", "·", ".58", "0.58"]]
    assert "α = 0.5" in page.text_content("#credit")
    rows = [row.locator("td").all_text_contents() for row in page.locator("#map tr").all()]
    assert rows[1:] == [
        ["+0.50", "+1.50", ""],
        ["−2.00", "−0.50", ""],
        ["0.00", "0.00", ""],
        ["0.00", "0.00", "0.00"],
        ["–", "", ""],
    ]


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        ("for i in range(3): print(i) # all", "kkfnfc"),
        ("x = f'a{1}' + r\"\\d\" + '''a\nb''' + 'open", "ssss"),
        ("if (a): return_ = 1_000 + 0xff + 1.5e-3j + .5", "knnnn"),
        ("'it\\'s' # '\n\"\"\"no end", "scs"),
        ("größe = len(x1)", "f"),
        (EVIL, "ns"),
        ("", ""),
    ],
)
def test_code_is_coloured_and_stays_as_it_is(page, code, kinds):
    shown = page.evaluate(
        "code => { const pre = make('pre', {}, ...highlight(code));"
        "return [pre.textContent, [...pre.children].map(e => e.className).join('')]; }",
        code,
    )
    assert shown == [code, kinds]


def test_a_click_on_a_curve_goes_to_the_nearest_recorded_step(page):
    svg = page.locator("#curves svg").first
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.62, box["y"] + 40)
    assert "step 2" in page.text_content("#curves .curve p")
    page.mouse.click(box["x"] + box["width"] - 8, box["y"] + 40)
    assert texts(page, "#step b") == ["step 4"]


def test_a_narrow_window_does_not_scroll_sideways(page):
    page.set_viewport_size({"width": 420, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_without_recorded_steps_only_curves_are_shown(chromium, tmp_path):
    run = write_run(tmp_path / "run", steps=())
    (run / "report.html").write_text(view.report(run), encoding="utf-8")
    tab = chromium.new_page()
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto((run / "report.html").as_uri())
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("f")
    tab.locator("#curves svg").first.click()
    assert not tab.is_visible("#recorded") and tab.locator("#curves svg").count() == 1
    assert "there are curves alone" in tab.text_content("#notes") and not errors
    tab.close()


def test_a_picture(chromium, file, tmp_path):
    picture = tmp_path / "report.png"
    python = [sys.executable, "-m", "gtpo_jax.view", file.parent, f"--screenshot={picture}"]
    subprocess.run(python, check=True, capture_output=True)
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    size = (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))
    assert size == (1440, 1000)
