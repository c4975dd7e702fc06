"""Rank the first open task of a project by dragging, in headless Chromium; run by the environment that has selenium.

    python label_studio_browser.py URL EMAIL PASSWORD PROJECT SCREENSHOT ORDER...

ORDER are numbers of answers, best first. Prints the numbers as the page shows them at the end, then the page's title.
"""

import sys
import time

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1000",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
    "--force-device-scale-factor=1",
)  # fmt: skip


def browser():
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for option in OPTIONS:
        options.add_argument(option)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))


ITEMS = "[data-rfd-draggable-id], [data-rbd-draggable-id]"
LISTS = "[data-rfd-droppable-id], [data-rbd-droppable-id]"


def drag(page, item, place):
    """Move an answer by the mouse, in small steps as a hand does, to the top of the ranking."""
    right = place.location["x"] + place.size["width"] / 2 - item.location["x"] - item.size["width"] / 2
    down = place.location["y"] + 45 - item.location["y"] - item.size["height"] / 2 - 8
    actions = ActionChains(page, duration=60)
    actions.move_to_element(item).click_and_hold().move_by_offset(0, 8)
    for _ in range(10):
        actions.move_by_offset(round(right / 10), round(down / 10))
    actions.pause(0.4).release().perform()
    time.sleep(0.8)


def answers(place):
    """The numbers of the answers in a list, from its top."""
    return [item.text.split()[1] for item in place.find_elements(By.CSS_SELECTOR, ITEMS)]


def main(url, email, password, project, screenshot, *order):
    page = browser()
    try:
        page.get(f"{url}/user/login/")
        page.find_element(By.NAME, "email").send_keys(email)
        page.find_element(By.NAME, "password").send_keys(password)
        page.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        WebDriverWait(page, 30).until(lambda p: "/login" not in p.current_url)
        page.get(f"{url}/projects/{project}/data?labeling=1")
        wait = WebDriverWait(page, 40)
        wait.until(lambda p: p.find_elements(By.CSS_SELECTOR, ITEMS))
        for number in reversed(order):
            left, ranking = page.find_elements(By.CSS_SELECTOR, LISTS)[:2]
            item = next(i for i in left.find_elements(By.CSS_SELECTOR, ITEMS) if i.text.split()[1] == number)
            drag(page, item, ranking)
        page.save_screenshot(screenshot)
        print(*answers(page.find_elements(By.CSS_SELECTOR, LISTS)[1]))
        print(page.title)
        page.find_element(By.XPATH, "//button[normalize-space()='Submit']").click()
        time.sleep(2)
    finally:
        page.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
