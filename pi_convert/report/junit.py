"""A report's checks as JUnit XML, which pipelines show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from pi_convert.report.document import Report, Result

_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def junit_xml(report: Report) -> str:
    """One test case a check; what could not be told is a failure, what could not run is skipped."""
    counts = {result: sum(c.result is result for c in report.checks) for result in Result}
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        suites,
        "testsuite",
        name=f"pi-convert {report.kind}",
        tests=str(len(report.checks)),
        failures=str(counts[Result.FAILED]),
        skipped=str(counts[Result.SKIPPED]),
        errors="0",
        time=f"{report.seconds:.1f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in report.environment.items():
        ElementTree.SubElement(properties, "property", name=name, value=_legal(value))
    for check in report.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_legal(check.group), name=_legal(check.name)
        )
        if check.result is Result.PASSED:
            ElementTree.SubElement(case, "system-out").text = _legal(check.message)
        else:
            tag = "failure" if check.result is Result.FAILED else "skipped"
            ElementTree.SubElement(case, tag, message=_legal(check.message))
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _legal(text: str) -> str:
    return _NOT_XML.sub("�", text)
