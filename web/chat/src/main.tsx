import { render } from "preact";
import "../../src/base.css";
import { draw } from "../../src/icons";
import { learn } from "../../src/text";
import "../../src/theme";
import { App } from "./app";
import { resume } from "./library";
import { loadModels } from "./model";
import "./style.css";
import { ZH } from "./zh";

learn(ZH);
draw({
  copy: "M6 2.5h7v8H6zM3 5.5v8h7v-1",
  edit: "M3 13l.6-2.8L11 2.8l2.2 2.2-7.4 7.4L3 13zM9.6 4.2l2.2 2.2",
  send: "M8 13.5v-11M3.5 7L8 2.5 12.5 7",
  down: "M8 2.5v11M3.5 9L8 13.5 12.5 9",
  side: "M2.5 3h11v10h-11zM6 3v10",
  sliders: "M2.5 4.5h6M11.5 4.5h2M10 3v3M2.5 11.5h2M7.5 11.5h6M6 10v3",
  chips: "M2 4h4.5v3.2H2zM8.5 4H14v3.2H8.5zM2 9.2h6.5v3.2H2zM10.5 9.2H14v3.2h-3.5z",
  download: "M8 2.5v7.5M4.8 7L8 10.2 11.2 7M3 13.5h10",
  upload: "M8 10.5V3M4.8 5.8L8 2.6l3.2 3.2M3 13.5h10",
  key: "M10.2 2.5a3.3 3.3 0 11-2.6 5.4L2.8 12.6v1h2.4v-1.6h1.6v-1.6M11 5.2v.1",
});
resume();
void loadModels();
render(<App />, document.getElementById("page")!);
