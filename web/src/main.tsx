import { render } from "preact";
import "uplot/dist/uPlot.min.css";
import { ahead, runPath } from "./api";
import { App } from "./app";
import "./base.css";
import { route } from "./route";
import "./style.css";
import { learn } from "./text";
import "./theme";
import { ZH } from "./zh";

learn(ZH);
const [page, run] = route.value.path;
if (page === "run" && run) ahead(["", "/series", "/incidents", "/lineage"].map((rest) => runPath(run, rest)));
else if (!page) ahead(["api/runs"]);
render(<App />, document.getElementById("page")!);
