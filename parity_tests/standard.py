"""The one standard of equality, for those who compare: see `probly_common.standard`."""

from probly_common.standard import MEANING_LIMIT as MEANING_LIMIT
from probly_common.standard import NOISE_FLOOR as NOISE_FLOOR
from probly_common.standard import PRECISION_LIMIT as PRECISION_LIMIT
from probly_common.standard import SIGNIFICANT_BITS as SIGNIFICANT_BITS
from probly_common.standard import TRAJECTORY_LIMIT as TRAJECTORY_LIMIT
from probly_common.standard import UNIT_ROUNDOFF as UNIT_ROUNDOFF
from probly_common.standard import Arrays as Arrays
from probly_common.standard import Errors as Errors
from probly_common.standard import Verdict as Verdict
from probly_common.standard import assert_close as assert_close
from probly_common.standard import assert_holds as assert_holds
from probly_common.standard import assert_same_trajectory as assert_same_trajectory
from probly_common.standard import bounded as bounded
from probly_common.standard import error as error
from probly_common.standard import exact as exact
from probly_common.standard import farthest as farthest
from probly_common.standard import meaning_limit as meaning_limit
from probly_common.standard import precision_limit as precision_limit
from probly_common.standard import ulps as ulps
