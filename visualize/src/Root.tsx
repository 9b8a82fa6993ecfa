// The four compositions. Their props come from files (--props=FILE): nothing is drawn from numbers that stand here.

import React from "react";
import { Composition } from "remotion";
import { AttentionVisualization } from "./AttentionVisualization";
import type { AttentionVisualizationProps, ScalingLawsProps, TrainingLossProps, TransformerArchitectureProps } from "./props";
import { ScalingLaws } from "./ScalingLaws";
import { FPS, HEIGHT, SECONDS, WIDTH } from "./theme";
import { TrainingLoss } from "./TrainingLoss";
import { TransformerArchitecture } from "./TransformerArchitecture";

const size = { width: WIDTH, height: HEIGHT, fps: FPS, durationInFrames: FPS * SECONDS };

export const Root: React.FC = () => (
  <>
    <Composition id="TransformerArchitecture" component={TransformerArchitecture} {...size} defaultProps={{} as TransformerArchitectureProps} />
    <Composition id="TrainingLoss" component={TrainingLoss} {...size} defaultProps={{} as TrainingLossProps} />
    <Composition id="AttentionVisualization" component={AttentionVisualization} {...size} defaultProps={{} as AttentionVisualizationProps} />
    <Composition id="ScalingLaws" component={ScalingLaws} {...size} defaultProps={{} as ScalingLawsProps} />
  </>
);
