"""Opens a report in headless Chromium, as wide as on a laptop, a projector and a phone, and looks for faults.

    pip install -r tests/requirements-render.txt             # and Chromium with its driver: apt install chromium-driver
    python tests/render.py runs/tiny/pagrpo/report.html --out shots

Writes laptop.png, … (the whole page) and pictures of the sections. Exits with 1 if the console holds an error,
the page scrolls sideways, Tab does not reach something that can have the focus, or a text has less contrast than WCAG
AA asks for (4.5, large text 3).
"""
import argparse
import base64
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-component-update")
SIZES = {"laptop": (1440, 900), "projector": (1024, 768), "phone": (390, 844)}

# Texts whose contrast is too low. Half-transparent backgrounds are laid over those behind them, and of a striped one
# the strongest stripe counts.
CONTRAST = """
function parse(text) {
  const n = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  return n.length > 3 ? n : [...n.slice(0, 3), 1];
}
function over(top, below) { return top.slice(0, 3).map((x, i) => x * top[3] + below[i] * (1 - top[3])); }
function luminance(c) {
  const [r, g, b] = c.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(node) {
  if (!node) return [255, 255, 255];
  const style = getComputedStyle(node), stripes = style.backgroundImage.match(/rgba?\\([^)]*\\)/g) || [];
  const layers = [style.backgroundColor, ...stripes].map(parse).sort((a, b) => b[3] - a[3]);
  return over(layers[0], background(node.parentElement));
}
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement, style = getComputedStyle(node);
  const drawn = node.getClientRects().length && !node.closest("script, style, option");
  if (!walker.currentNode.data.trim() || !drawn) continue;
  const inside = node.namespaceURI.endsWith("svg"), behind = background(node);
  const ink = over(parse(inside ? style.fill : style.color), behind);
  const [a, b] = [luminance(ink), luminance(behind)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
  const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
  if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 60)}`);
}
return found;
"""
# Elements that reach over the right edge, unless they are in a part that scrolls by itself; cells squeezed to a column
# of letters.
OVERFLOW = """
const wide = [...document.body.querySelectorAll("*")].filter(node => node.getBoundingClientRect().right > innerWidth + 1
  && !node.closest(".scroll, #tip, [hidden]") && getComputedStyle(node).position !== "absolute");
const whole = document.documentElement.scrollWidth, page = whole > innerWidth ? [`the page is ${whole} wide`] : [];
for (const cell of document.querySelectorAll("td, th, dt, dd")) {
  const {width, height} = cell.getBoundingClientRect(), words = cell.textContent.split(/\\s+/);
  const longest = Math.max(...words.map(word => word.length));
  if (height > 60 && width < 6 * Math.min(longest, 10)) page.push(`squeezed: ${cell.textContent.slice(0, 40)}`);
}
return [...page, ...wide.slice(0, 5).map(node =>
  `${node.tagName}.${node.className}: ${node.textContent.slice(0, 50)}`)];
"""
# What can have the focus. Of radio buttons with one name Tab reaches one, the arrow keys the others.
FOCUSABLE = """
const all = document.querySelectorAll("a[href], button, input, select, summary, textarea, [tabindex]");
window.reachable = [...all].filter(node => !node.disabled && node.tabIndex >= 0 && node.getClientRects().length
  && !(node.type === "radio" && !node.checked));
return reachable.length;
"""
FOCUSED = "return window.reachable.indexOf(document.activeElement)"
NAMES = "return window.reachable.filter((_, i) => !arguments[0].includes(i)).map(node => node.outerHTML.slice(0, 90))"


def open_browser(size: tuple[int, int], profile: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600})
    return browser


def unreached(browser: webdriver.Chrome) -> list[str]:
    """Presses Tab through the whole page. Returns what can have the focus and never got it."""
    count, reached = browser.execute_script(FOCUSABLE), set()
    browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    for _ in range(count + 5):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(browser.execute_script(FOCUSED))
    return browser.execute_script(NAMES, sorted(reached))


def use(browser: webdriver.Chrome, picture: Path) -> list[str]:
    """Presses what can be pressed: arrow keys on a chart and on a response, modes, steps. Returns faults. `picture`
    gets the screen while a token is read with GRPO's credit."""
    faults, find = [], partial(browser.find_elements, By.CSS_SELECTOR)
    click = partial(browser.execute_script, "arguments[0].click()")
    for chart in find("figure svg[tabindex]")[:1]:
        chart.send_keys(Keys.ARROW_LEFT)
        readout = find("figure output")[0].text
        faults += [] if readout.startswith("step ") else [f"the chart's readout says {readout!r}"]
    for button in find("[aria-label='Earlier step'], [aria-label='Later step']"):
        button.send_keys(Keys.ENTER)
    for radio in find("input[type=radio]"):
        before = [x.text for x in find(".why")]
        click(radio)
        same = before == [x.text for x in find(".why")]
        faults += ["another credit mode changes nothing"] if same and radio.get_attribute("value") != "pa" else []
    for radio in find("input[value=grpo]"):
        click(radio)
    for row in find(".tokens")[1:2]:
        row.send_keys(*[Keys.ARROW_RIGHT] * 5)
        tip = find("#tip")[0].text
        faults += [] if "advantage" in tip else [f"a token's readout says {tip!r}"]
        browser.save_screenshot(str(picture))
    return faults


def shoot(browser: webdriver.Chrome, out: Path, name: str) -> None:
    def save(file: str, y: float, height: float) -> None:
        clip = {"x": 0, "y": max(0, y), "width": width, "height": height, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        (out / file).write_bytes(base64.b64decode(shot["data"]))

    width, height = browser.execute_script("scrollTo(0, 0); return [innerWidth, document.documentElement.scrollHeight]")
    save(f"{name}.png", 0, min(height, 16000))
    for part in browser.find_elements(By.CSS_SELECTOR, "header, main > section"):
        box, label = part.rect, part.get_attribute("id") or "top"
        save(f"{name}-{label}.png", box["y"] - 20, min(box["height"] + 40, 6000))


def look(report: Path, out: Path, name: str) -> dict[str, list[str]]:
    """Takes the pictures of one size. Returns faults by kind."""
    with tempfile.TemporaryDirectory() as profile:
        browser = open_browser(SIZES[name], profile)
        try:
            browser.get(report.resolve().as_uri())
            shoot(browser, out, name)
            browser.execute_script("document.querySelectorAll('details').forEach(node => { node.open = true })")
            found = {"contrast": browser.execute_script(CONTRAST), "too wide": browser.execute_script(OVERFLOW),
                     "not reached by Tab": unreached(browser), "use": use(browser, out / f"{name}-token.png")}
            return found | {"console": [f"{x['level']}: {x['message']}" for x in browser.get_log("browser")]}
        finally:
            browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("--out", type=Path, default="shots", help="folder for the pictures [shots]")
    args, faults = parser.parse_args(), []
    args.out.mkdir(parents=True, exist_ok=True)
    for name in SIZES:
        for what, lines in look(args.report, args.out, name).items():
            print(f"{name}, {what}: {len(lines) or 'nothing found'}", *lines[:10], sep="\n    ")
            faults += lines
    print(f"Pictures: {args.out}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
