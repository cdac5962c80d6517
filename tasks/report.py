"""Say what eval.py measured, with its uncertainty, in a table, in sentences and in a JSON file.

An interrupted evaluation goes on from the file.

A report is what is known of one model: {"task", "model", "window", "original_window" (in tokens, the latter
before any interpolation that is recorded), "results": [one entry for each length or benchmark]}. All models
of a call stand in one table and one file. A task is shown by one of the tables below: shares of right
answers, RULER's scores, perplexities, scores of benchmarks.
"""

import math

import numpy as np

from storage.errors import InputError
from storage.files import write_json
from storage.values import describe_changes, read_record
from tasks import ruler

NEWER = {"text_key": "text"}  # settings that files of earlier versions lack, and their value there
WORKS = 0.95  # a model works at a length where it gives at least this share of right answers
GUESSES = 1000  # a model with a perplexity above this predicts next to nothing: it may be untrained
HOLDS = 1.05  # a perplexity holds up to this ratio to that at the shortest length
DEPTHS = 5  # ranges of depth in the table of right answers


# ---------------------------------------------------------------- uncertainty


def wilson(right, n):
    """Return the 95% interval [low, high] of a share, `right` out of n (Wilson 1927).

    It stays sensible at 0% and 100%, where the mean plus or minus a deviation does not.
    """
    z = 1.96  # standard deviations on each side that hold 95% of a normal distribution
    centre = right + z * z / 2
    half = z * math.sqrt(right * (n - right) / n + z * z / 4)
    low, high = (centre - half) / (n + z * z), (centre + half) / (n + z * z)
    return [max(0.0, low), min(1.0, high)]


def over_documents(nats, count):
    """Return the perplexity of all tokens and its standard error, which is None for a single document.

    nats, count: summed loss and number of tokens of each document, 1-d arrays. Documents differ more than
    tokens do, so they are the sample: the error is that of a ratio of two sums over documents (the delta
    method).
    """
    loss = nats.sum() / count.sum()
    ppl = math.exp(min(loss, 700))  # exp of more is not a float
    n = len(nats)
    if n == 1:
        return ppl, None
    residuals = nats - loss * count
    return ppl, ppl * math.sqrt(n / (n - 1) * (residuals**2).sum()) / count.sum()


def over_tasks(scores_by_task):
    """Return the mean of the tasks' mean scores and its standard error, which is None for a single sample.

    scores_by_task: the scores of each task's samples, all in one list of lists. The tasks are given and only
    their samples are drawn, so the error is that of a mean of independent means.
    """
    scores = np.array(scores_by_task)
    tasks, samples = scores.shape
    if samples == 1:
        return scores.mean(), None
    return scores.mean(), math.sqrt((scores.var(1, ddof=1) / samples).sum()) / tasks


def loss_change(first, result):
    """Return the mean change of the loss from one length to another and its standard error, as text.

    It is in nats a token. Both must have scored the same tokens of the same documents. What documents differ
    in cancels, so this error is far smaller than those of the two perplexities.
    """
    before, after = loss_of_documents(first), loss_of_documents(result)
    change = after - before
    mean = f"{change.mean():+.3f}"
    if len(change) == 1:
        return mean
    return f"{mean} ± {change.std(ddof=1) / math.sqrt(len(change)):.3f}"


def loss_of_documents(result):
    """Return the mean loss of each document in nats a token, a 1-d array."""
    return np.array([document["nats"] / document["tokens"] for document in result["by_document"]])


def by_depth(by_trial, ranges):
    """Return the share of right answers in each of so many equal ranges of depth, None without a trial."""
    correct = [[] for _ in range(ranges)]
    for trial in by_trial:
        i = min(int(trial["depth"] * ranges), ranges - 1)
        correct[i].append(trial["correct"])
    return [sum(answers) / len(answers) if answers else None for answers in correct]


# ---------------------------------------------------------------- the JSON file


def read(path, settings, table, unit):
    """Return the reports that an earlier call left in a file.

    table: the Table of the task. unit: the key of what an entry of `results` is of. Raise InputError if the
    file holds something else, or results of an evaluation with other settings.
    """
    try:
        written = read_record(path)
        last = {key: written[key] for key in ("task", "model", "results")}
        earlier = NEWER | written["settings"]
        reports = [*written.get("compared", []), last]
        if [report["model"] for report in reports] != earlier["model"]:
            raise ValueError("other models than its settings say")
        if earlier.get("task", last["task"]) != last["task"]:
            raise ValueError("another task than its settings say")
        if last["task"] == settings["task"]:  # else the file is refused below, for that
            for report in reports:
                check_results(report, table, unit)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError):
        raise InputError(f"{path}: holds no results to go on from; remove it or name another file") from None
    changes = describe_changes(earlier, settings)
    if changes:
        others = f"holds results of another evaluation ({changes})"
        raise InputError(f"{path}: {others}; remove it or name another file")
    return reports


def check_results(report, table, unit):
    """Raise an error of some kind if the results of a report from a file are not what its table shows.

    The table is made and dropped: it looks at nearly all that is in an entry.
    """
    expected = int if unit == "length" else str
    for result in report["results"]:
        if type(result[unit]) is not expected:
            raise TypeError(f"{unit} is {result[unit]!r}")
    if report["results"]:
        table.introduction(report["results"])
        table.rows([report], report["task"])
        list(table.conclusions(report["results"]))


def write(path, settings, reports):
    """Write all reports: the last model's on top, the others under `compared`."""
    *others, last = reports
    content = dict(last)
    if others:
        content["compared"] = others
    write_json(path, content | {"settings": settings})


# ---------------------------------------------------------------- one table for each kind of result


class Table:
    """How results of one kind are shown: what stands in their table, and what they say in words.

    `results` are those of one model, the entries of its report; `result` is one of them.
    """

    def introduction(self, results):
        """Return the line above the table, None if the headings say enough."""
        return None

    def headings(self, results):
        """Return the headings of the columns, first those of `headline`, then those of `details`."""
        raise NotImplementedError

    def headline(self, result):
        """Return what counts in a result and its uncertainty, two texts."""
        raise NotImplementedError

    def details(self, result, first):
        """Return the other columns of a result. first: the model's first result, at the shortest length."""
        raise NotImplementedError

    def conclusions(self, results):
        """Yield what the results say, in sentences that go on after the model's name."""
        raise NotImplementedError

    def rows(self, reports, task):
        """Return the rows of the table, lists of texts, the headings first.

        At each length (or benchmark) the models stand one below the other. task: its name.
        """
        first_results = reports[0]["results"]
        by_length = "length" in first_results[0]
        rows = [["length" if by_length else "", task, *self.headings(first_results)]]
        for i in range(len(first_results)):
            for report in reports:
                result = report["results"][i]
                label = ""
                if report is reports[0]:
                    label = f"{result['length']:,}" if by_length else result["benchmark"]
                model = report["model"] + ("*" if result.get("beyond_window") else "")
                details = self.details(result, report["results"][0])
                rows.append([label, model, *self.headline(result), *details])
        return rows


class AccuracyTable(Table):
    """Shows shares of right answers, also by the depth of the answer in the text: passkey and needle."""

    def introduction(self, results):
        depths = "on the right, the share of correct answers by the key's depth in the text"
        return f"{results[0]['trials']} prompts a length; {depths}"

    def headings(self, results):
        ranges = [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}%" for i in range(DEPTHS)]
        return ["correct", "95% interval", *ranges]

    def headline(self, result):
        low, high = result["interval"]
        return [percent(result["accuracy"]), f"{100 * low:.0f}-{100 * high:.0f}%"]

    def details(self, result, first):
        return [percent(share) for share in by_depth(result["by_trial"], DEPTHS)]

    def conclusions(self, results):
        if results[0]["accuracy"] < WORKS:
            if any(result["accuracy"] for result in results):
                yield f"is below {WORKS:.0%} already at {results[0]['length']:,} tokens"
            else:
                yield "gives no right answer at any length"
        else:
            works_to = longest_that_holds(results, lambda result: result["accuracy"] >= WORKS)
            and_so = ", the longest asked for" if works_to == results[-1]["length"] else ""
            yield f"works to {works_to:,} tokens ({WORKS:.0%} or more at every length){and_so}"
        checked = [trial for result in results for trial in result["by_trial"] if "agrees" in trial]
        if checked:
            agree = sum(trial["agrees"] for trial in checked)
            of_all = f"{agree} of {len(checked)} prompts"
            yield f"decoded greedily gives the verdict of one-pass scoring on {of_all}"


class PerplexityTable(Table):
    """Shows perplexities by length, and the change of the loss where all lengths scored the same tokens.

    for_more: how to score more than a part of the texts, a text.
    """

    def __init__(self, for_more):
        self.for_more = for_more

    def introduction(self, results):
        first = results[0]  # at the shortest length, which has the most documents
        if "text_tokens" not in first:  # in a file that an earlier version wrote
            return None
        documents = f"{first['documents']:,} document" + ("" if first["documents"] == 1 else "s")
        if first["tail"]:
            which = f"the last {first['tail']:,} of {documents}"
        elif first["cut_to"]:
            which = f"what a window of {first['cut_to']:,} holds of {documents} ({self.for_more})"
        else:
            which = f"all of {documents}"
        share = f"{first['tokens']:,} of the texts' {first['text_tokens']:,} tokens are scored"
        return f"{share}, each with the same weight: {which}"

    def headings(self, results):
        headings = ["perplexity", "± error", "documents", "left out", "tokens scored"]
        if results[0]["tail"]:
            headings.append(f"loss against {results[0]['length']:,}")
        return headings

    def headline(self, result):
        return with_error(result["ppl"], result["standard_error"], "{:,.2f}")

    def details(self, result, first):
        cells = [f"{result[key]:,}" for key in ("documents", "left_out", "tokens")]
        if result["tail"]:
            cells.append("" if result["length"] == first["length"] else loss_change(first, result))
        return cells

    def conclusions(self, results):
        filled = [result for result in results if result["documents"]]
        shortest, longest = filled[0], filled[-1]
        # A perplexity of other documents cannot be compared.
        same = [result for result in filled if result["documents"] == shortest["documents"]]
        in_window = not shortest.get("beyond_window")  # else nothing can be said to hold
        if in_window and shortest["ppl"] > GUESSES:
            yield f"hardly predicts these texts (perplexity {shortest['ppl']:,.0f}): is it trained at all?"
        # With a tail, the change of the loss in the table says more.
        elif in_window and len(same) > 1 and not shortest["tail"]:
            held_to = longest_that_holds(same, lambda result: result["ppl"] <= HOLDS * shortest["ppl"])
            others = "" if len(same) == len(filled) else "; other lengths have other documents"
            meaning = f"at no length more than {HOLDS - 1:.0%} above that at {shortest['length']:,}{others}"
            yield f"holds its perplexity to {held_to:,} tokens ({meaning})"
        if longest.get("by_position"):
            bins = [f"{b['from']:,}-{b['to'] - 1:,}: {b['loss']:.3f}" for b in longest["by_position"]]
            windows = f"windows of {longest['length']:,}"
            yield f"has this loss by position in {windows}: {', '.join(bins)} (nats a token)"


class ScoreTable(Table):
    """Shows the scores of ordinary benchmarks."""

    def headings(self, results):
        return ["score", "± error", "metric", "shots", "items"]

    def headline(self, result):
        return with_error(result["score"], result["standard_error"], "{:.1%}")

    def details(self, result, first):
        return [result["metric"], str(result["shots"]), f"{result['items']:,}"]

    def conclusions(self, results):
        average = np.mean([result["score"] for result in results])
        yield f"scores {average:.1%} on average of {len(results)} benchmarks"


class RulerTable(Table):
    """Shows RULER's scores: a row for each task and model, a column for each length, their mean below."""

    def introduction(self, results):
        prompts = f"{results[0]['samples']} prompts a task and length, with 95% intervals"
        return f"{prompts}; (texts): needles are in the given texts and not in NVIDIA's essays"

    def headline(self, result):
        return with_error(result["score"], result["standard_error"], "{:.1%}")

    def rows(self, reports, task):
        first_results = reports[0]["results"]
        rows = [["", task, *(f"{result['length']:,}" for result in first_results)]]
        for name in [*first_results[0]["by_task"], "mean"]:
            over_texts = name in ruler.TASKS and ruler.TASKS[name].over_texts
            label = f"{name} (texts)" if over_texts else name
            for report in reports:
                cells = [self.cell(result, name) for result in report["results"]]
                rows.append([label if report is reports[0] else "", report["model"], *cells])
        return rows

    def cell(self, result, name):
        """Return the score of a task, or the mean of all, with its uncertainty, a text."""
        if name == "mean":
            text = " ".join(self.headline(result))
        else:
            entry = result["by_task"][name]
            low, high = entry["interval"]
            text = f"{percent(entry['score'])} ({100 * low:.0f}-{100 * high:.0f})"
        return text + ("*" if result["beyond_window"] else "")

    def conclusions(self, results):
        shown = [f"{result['score']:.1%} at {result['length']:,} tokens" for result in results]
        at_both_ends = shown[0] if len(shown) == 1 else f"{shown[0]} and {shown[-1]}"
        yield f"scores {at_both_ends} on average of {len(results[0]['by_task'])} tasks"


def percent(share):
    """Return a share as text, "" for None."""
    return "" if share is None else f"{share:.0%}"


def with_error(value, error, form):
    """Return a value and its standard error as two texts, "-" for None. form: such as "{:.1%}"."""
    shown_value = "-" if value is None else form.format(value)
    shown_error = "-" if error is None else "± " + form.format(error)
    return [shown_value, shown_error]


def longest_that_holds(results, holds):
    """Return the longest length up to which holds(result) is always true. It must be true at the first."""
    reached = results[0]
    for result in results:
        if not holds(result):
            break
        reached = result
    return reached["length"]


# ---------------------------------------------------------------- printing


def print_reports(reports, task, table):
    """Print the table of all models and what follows from it.

    task: its name. table: a Table.
    """
    introduction = table.introduction(reports[0]["results"])
    if introduction:
        print(introduction)
    print_columns(table.rows(reports, task))
    if any(result.get("beyond_window") for report in reports for result in report["results"]):
        print("* longer than the model's window")
    for report in reports:
        for sentence in table.conclusions(report["results"]):
            print(report["model"], sentence)


def print_columns(rows):
    """Print rows of texts in columns: the first two flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2])]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]
        print("  ".join(left + right).rstrip())
