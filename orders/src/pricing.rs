//! What an order costs besides its lines, in whole cents.

use chassis::decimal::Cents;

/// The largest total: what `numeric(12, 2)` holds.
pub const MAX_TOTAL: Cents = Cents(999_999_999_999);

/// A tax in thousandths of a percent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TaxRate(i64);

impl TaxRate {
    /// Reads a percentage from 0 to 100 with at most three decimals: `19`, `7.7`, `8.875`.
    pub fn parse(text: &str) -> Option<TaxRate> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        let ends_in_point = text.ends_with('.');
        if whole.is_empty() || ends_in_point || !is_number(whole) || !is_number(fraction) {
            return None;
        }
        let thousandths: i64 =
            format!("{fraction:0<3}").parse().ok().filter(|_| fraction.len() <= 3)?;
        let rate = whole.parse::<i64>().ok()?.checked_mul(1000)?.checked_add(thousandths)?;
        (rate <= 100_000).then_some(TaxRate(rate))
    }

    /// The tax on an amount, rounded half up.
    fn of(self, amount: Cents) -> Option<Cents> {
        Some(Cents((amount.0.checked_mul(self.0)?.checked_add(50_000)?) / 100_000))
    }
}

/// The rules by which an order is priced.
#[derive(Clone, Debug)]
pub struct Pricing {
    /// ISO 4217.
    pub currency: String,
    /// What shipping costs.
    pub shipping_cost: Cents,
    /// From this total of the lines on shipping costs nothing.
    pub free_from: Option<Cents>,
    /// On the lines and the shipping, rounded once for the whole order.
    pub tax: TaxRate,
}

/// The sums of an order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Totals {
    /// Of all lines.
    pub items_total: Cents,
    /// Of the shipping.
    pub shipping_cost: Cents,
    /// Of the tax.
    pub tax_amount: Cents,
    /// Of everything.
    pub total_amount: Cents,
}

impl Pricing {
    /// The sums of an order with these lines, each a price and a quantity. `None` where the total is
    /// larger than [`MAX_TOTAL`].
    pub fn totals(&self, lines: impl Iterator<Item = (Cents, i32)>) -> Option<Totals> {
        let mut items_total: i64 = 0;
        for (price, quantity) in lines {
            items_total = items_total.checked_add(price.0.checked_mul(i64::from(quantity))?)?;
        }
        let items_total = Some(Cents(items_total)).filter(|total| *total <= MAX_TOTAL)?;
        let is_free = self.free_from.is_some_and(|from| items_total >= from);
        let shipping_cost = if is_free { Cents(0) } else { self.shipping_cost };
        let taxed = Cents(items_total.0 + shipping_cost.0);
        let tax_amount = self.tax.of(taxed)?;
        let total_amount = Cents(taxed.0 + tax_amount.0);
        (total_amount <= MAX_TOTAL).then_some(Totals {
            items_total,
            shipping_cost,
            tax_amount,
            total_amount,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pricing(tax: &str) -> Pricing {
        Pricing {
            currency: "EUR".to_owned(),
            shipping_cost: Cents(490),
            free_from: Some(Cents(5000)),
            tax: TaxRate::parse(tax).unwrap(),
        }
    }

    #[test]
    fn a_tax_rate_has_at_most_three_decimals() {
        for (text, rate) in [
            ("0", Some(0)),
            ("19", Some(19_000)),
            ("7.7", Some(7_700)),
            ("8.875", Some(8_875)),
            ("100.000", Some(100_000)),
            ("100.001", None),
            ("1.2345", None),
            ("-1", None),
            ("1e1", None),
            ("", None),
            ("1.", None),
            (".5", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(TaxRate::parse(text), rate.map(TaxRate), "{text}");
        }
    }

    #[test]
    fn shipping_is_free_from_a_total_on_and_the_tax_is_rounded_half_up_once() {
        let totals = |tax: &str, lines: &[(i64, i32)]| {
            let lines = lines.iter().map(|(price, quantity)| (Cents(*price), *quantity));
            let totals = pricing(tax).totals(lines).unwrap();
            [totals.items_total, totals.shipping_cost, totals.tax_amount, totals.total_amount]
                .map(|cents| cents.0)
        };
        assert_eq!(totals("0", &[(999, 2)]), [1998, 490, 0, 2488]);
        assert_eq!(totals("0", &[(2500, 2)]), [5000, 0, 0, 5000]);
        assert_eq!(totals("0", &[(4999, 1)]), [4999, 490, 0, 5489]);
        // 5 % of 50.10 is 2.505; of each of the two halves it would be 1.2525.
        assert_eq!(totals("5", &[(2505, 2)]), [5010, 0, 251, 5261]);
        assert_eq!(totals("5", &[(5009, 1)]), [5009, 0, 250, 5259]);
        assert_eq!(totals("8.875", &[(10_000, 1)]), [10_000, 0, 888, 10_888]);
    }

    #[test]
    fn a_total_that_does_not_fit_is_none() {
        let totals = |price: i64, quantity: i32| {
            pricing("19").totals([(Cents(price), quantity)].into_iter())
        };
        assert!(totals(MAX_TOTAL.0, 1).is_none());
        assert!(totals(i64::MAX, 2).is_none());
        assert!(totals(840_336_134_453, 1).is_some());
    }
}
