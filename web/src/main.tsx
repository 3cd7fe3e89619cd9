import { render } from "preact";
import "uplot/dist/uPlot.min.css";
import { App } from "./app";
import "./style.css";
import "./theme";

render(<App />, document.getElementById("page")!);
