// The sentence is read token by token: each map gains a row, and the sentence shows what the reading token reads.

import React from "react";
import { interpolateColors } from "remotion";
import { Missing, Page, useProgress } from "./parts";
import type { AttentionVisualizationProps } from "./props";
import { AMBER, BLUE, HEIGHT, INK, PANEL, SOFT, WIDTH } from "./theme";

const shade = (weight: number): string => interpolateColors(Math.sqrt(weight), [0, 0.35, 0.75, 1], [PANEL, "#27457a", BLUE, "#fff3d6"]);
const printable = (token: string): string => token.replace(/\n/g, "⏎").replace(/^ /, "");

export const AttentionVisualization: React.FC<AttentionVisualizationProps> = (props) => {
  const progress = useProgress();
  if (!props.layers) return <Missing name="AttentionVisualization" />;
  const { tokens, layers } = props;
  const count = tokens.length;
  const reading = Math.min(count - 1, Math.floor(progress(1, 9) * count));
  const shown = progress(0.5, 0.5);
  const heads = Math.max(...layers.map((layer) => layer.heads.length));
  const left = 80;
  const width = (WIDTH - left - 80 - (heads - 1) * 44) / heads;
  const top = 350;
  const height = (HEIGHT - top - 50 - (layers.length - 1) * 56) / layers.length;
  const all = layers.flatMap((layer) => layer.heads);
  const mean = tokens.map((_, key) => all.reduce((sum, head) => sum + head.weights[reading][key], 0) / all.length);
  return (
    <Page title="What reads what" below={`run ${props.tag}: attention, computed by the model on this text; rows read, columns are read, the brighter the more`}>
      <div style={{ position: "absolute", left: 80, right: 80, top: 196, display: "flex", flexWrap: "wrap", gap: 10, opacity: shown }}>
        {tokens.map((token, i) => (
          <span
            key={i}
            style={{
              padding: "8px 14px",
              borderRadius: 10,
              fontSize: Math.min(34, 1100 / count),
              color: mean[i] > 0.3 ? "#0d1424" : INK,
              opacity: i <= reading ? 1 : 0.3,
              background: i <= reading ? shade(mean[i]) : PANEL,
              outline: i === reading ? `4px solid ${AMBER}` : "none",
            }}
          >
            {printable(token)}
          </span>
        ))}
      </div>
      <svg width={WIDTH} height={HEIGHT} style={{ position: "absolute" }} opacity={shown}>
        {layers.map((layer, row) =>
          layer.heads.map((head, column) => {
            const x = left + column * (width + 44);
            const y = top + row * (height + 56);
            return (
              <g key={`${layer.layer}.${head.head}`}>
                <text x={x} y={y - 12} fontSize={23} fill={SOFT}>
                  layer {layer.layer}, head {head.head}
                </text>
                <rect x={x} y={y} width={width} height={height} fill={PANEL} rx={6} />
                {head.weights.slice(0, reading + 1).map((weights, q) =>
                  weights.slice(0, q + 1).map((weight, k) => (
                    <rect key={`${q}.${k}`} x={x + (k * width) / count} y={y + (q * height) / count} width={width / count - 1} height={height / count - 1} fill={shade(weight)} />
                  )),
                )}
                <rect x={x} y={y + (reading * height) / count} width={width} height={height / count} fill="none" stroke={AMBER} strokeWidth={2} />
              </g>
            );
          }),
        )}
      </svg>
    </Page>
  );
};
