// Renders stills or videos in one process, with one bundle and one browser; scripts/visualize.py writes the job.
//
//     node render.mjs JOB.json
//
// The job: {folder, kind: "still" or "video", browser, patience (ms), frame, frames, scale,
// pictures: [{name, props (a JSON file), target}]}. A picture is rendered in the folder, then moved to its target.

import { readFileSync, renameSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { bundle } from "@remotion/bundler";
import { openBrowser, renderMedia, renderStill, selectComposition } from "@remotion/renderer";

process.on("SIGTERM", () => process.exit(143)); // on exit Remotion ends its browser

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const quiet = { logLevel: "error" };

const entryPoint = fileURLToPath(new URL("src/index.ts", import.meta.url));
// rspack bundles in 3 s; webpack takes 17, or 3 with 170 MB of cache (dev/bench/2026-11-28_remotion.json)
const outDir = path.join(job.folder, "bundle");
const serveUrl = await bundle({ entryPoint, outDir, rspack: true, enableCaching: false });
const open = async (tries) => {
  try {
    return await openBrowser("chrome", { browserExecutable: job.browser, ...quiet });
  } catch (error) {
    if (tries === 1 || !/timed out/i.test(error.message)) throw error;
    return open(tries - 1); // it waits 25 s, too few on a busy machine
  }
};
const browser = await open(4);
try {
  for (const { name, props, target } of job.pictures) {
    const shared = {
      serveUrl,
      inputProps: JSON.parse(readFileSync(props, "utf8")),
      puppeteerInstance: browser,
      browserExecutable: job.browser,
      timeoutInMilliseconds: job.patience,
      ...quiet,
    };
    const composition = await selectComposition({ ...shared, id: name });
    const part = path.join(job.folder, path.basename(target));
    if (job.kind === "still") {
      await renderStill({ ...shared, composition, output: part, frame: job.frame, scale: job.scale });
    } else {
      const frameRange = job.frames ? [0, Math.min(job.frames, composition.durationInFrames) - 1] : null;
      await renderMedia({ ...shared, composition, codec: "h264", outputLocation: part, frameRange, scale: job.scale });
    }
    renameSync(part, target);
    console.log(target);
  }
} finally {
  await browser.close({ silent: true });
}
